"""Norms and gated units as one autograd node each, in the models that have the usual ones.

transformers writes them as a dozen elementwise operations that each keep what they need for backward, in float32
under autocast; and every linear layer casts the norm's output for itself. Here a norm keeps its input and a number
for each token, and gives the type that the linear layers compute in; a gated unit keeps its two inputs, and the
layer behind it nothing.

A module is taken over only if its `forward` is word for word the one known here: transformers copies the text from
model to model, and whatever reads differently stays as it is.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ftray.model import linear


class RMSNorm(torch.autograd.Function):
    """Root mean square normalisation (Zhang & Sennrich, arXiv:1910.07467) of the last axis, computed in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """`x` `[..., D]` to `dtype`."""
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of input and weight."""
        x, weight, inverse = ctx.saved_tensors
        normed = x.float() * inverse
        grad = grads[0].float()
        products = grad * normed
        grad_weight = products.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # What lies along the normalised input moves nothing.
        along = (products @ weight.float()[:, None]).div_(-x.shape[-1])
        grad_x = (grad * weight).addcmul_(normed, along).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None, None


class SwiGLU(torch.autograd.Function):
    """`silu(gate) * up` (Shazeer, arXiv:2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of the inputs' shape and type."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of gate and up; the activation is made again."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


class GatedLinear(torch.autograd.Function):
    """`W (silu(gate) * up) + b`: a gated unit and the layer behind it, which makes its input again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """`gate` and `up` `[..., in]`, `weight` `[out, in]` to `[..., out]` of `dtype`."""
        ctx.save_for_backward(gate, up, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        product = F.silu(gate).mul_(up).to(dtype)
        with torch.autocast(gate.device.type, enabled=False):
            return F.linear(product, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of gate, up, weight and bias."""
        gate, up, weight = ctx.saved_tensors
        grad, activated = grads[0], F.silu(gate)
        _, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        product = (activated * up).to(grad.dtype) if needs_weight else None
        grad_weight = None if product is None else linear.weight_gradient(grad, product, weight.dtype)
        grad_bias = linear.bias_gradient(grad, ctx.bias_dtype) if needs_bias else None
        grad_product = linear.input_gradient(grad, weight).to(gate.dtype)
        grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
        return grad_gate, activated.mul_(grad_product), grad_weight, grad_bias, None


def fuse(model: nn.Module) -> int:
    """Take over the norms and gated units of a model; returns how many modules that were."""
    found = 0
    for module in model.modules():
        for known, forward in ((LlamaRMSNorm, _norm), (LlamaMLP, _gated)):
            if _text(type(module).forward) == _text(known.forward) and (
                known is LlamaRMSNorm or _is_silu(module)
            ):
                module.forward = types.MethodType(forward, module)
                found += 1
                if known is LlamaMLP and type(module.down_proj) is nn.Linear:
                    behind = module.down_proj
                    behind.forward = types.MethodType(_behind_gate, behind)  # type: ignore[method-assign]
    return found


@functools.cache
def _text(function: Callable[..., Any]) -> str:
    """A function's source behind its signature."""
    try:
        return inspect.getsource(function).partition(":\n")[2]
    except (OSError, TypeError):
        return ""


def _is_silu(module: Any) -> bool:
    return isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    device = hidden_states.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = (
        torch.get_autocast_dtype(device)
        if cast
        else torch.promote_types(hidden_states.dtype, self.weight.dtype)
    )
    normed: torch.Tensor = RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype)
    return normed


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    # The layer behind is called as a module: strategies that share out weights gather them then.
    joined = getattr(down.forward, "__func__", None) is _behind_gate and not _looks_at_input(down)
    y: torch.Tensor = down(gate, up) if joined else down(SwiGLU.apply(gate, up))
    return y


def _looks_at_input(module: nn.Module) -> bool:
    """Whether somebody else's hook wants what the layer takes; DeepSpeed's look at weights only."""
    hooks = module._forward_pre_hooks.values()
    return any(not getattr(hook, "__module__", "").startswith("deepspeed") for hook in hooks)


def _behind_gate(self: Any, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    if up is None:  # called as the linear layer it is
        return nn.functional.linear(gate, self.weight, self.bias)
    y: torch.Tensor = GatedLinear.apply(gate, up, self.weight, self.bias, linear.computing_dtype(gate))
    return y
