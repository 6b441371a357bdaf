"""A frozen linear layer and a low-rank update of it as one autograd node."""

from typing import Any

import torch
import torch.nn.functional as F


class LowRankLinear(torch.autograd.Function):
    """`y = W x + b + s B A x` with `W` and `b` frozen, in the type that is computed in.

    The update is added inside its matrix product, forward and backward, so nothing as large as the layer's input or
    output is made twice; kept for backward are the input and `s A x`. Factors may be wider than that type: they are
    cast down here, and their gradients go back in their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """`x` `[..., in]`, `weight` `[out, in]`, `a` `[r, in]`, `b` `[out, r]` to `[..., out]`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            x = x.to(dtype)
            flat = x.flatten(0, -2)
            y = F.linear(flat, weight.to(dtype), None if bias is None else bias.to(dtype))
            inner = (flat @ a.to(dtype).T).mul_(scaling)
            y.addmm_(inner, b.to(dtype).T)
        ctx.save_for_backward(flat, weight, a, b, inner)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the input and of both factors."""
        flat, weight, a, b, inner = ctx.saved_tensors
        dtype = flat.dtype
        grad = grads[0].to(dtype).flatten(0, -2)
        grad_inner = (grad @ b.to(dtype)).mul_(ctx.scaling)
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        if needs_x:
            grad_x = (grad @ weight.to(dtype)).addmm_(grad_inner, a.to(dtype)).view(ctx.shape)
        if needs_a:
            grad_a = (grad_inner.T @ flat).to(a.dtype)
        if needs_b:
            grad_b = (grad.T @ inner).to(b.dtype)
        return grad_x, None, None, grad_a, grad_b, None
