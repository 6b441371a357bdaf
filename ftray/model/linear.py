"""Linear layers under autocast that keep no cast copy of their weight between forward and backward."""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class CastLinear(torch.autograd.Function):
    """`y = W x + b` in a narrower type than `W` has.

    Autograd would keep the narrow copy of every weight of the model until its backward pass: half as much again as
    the weights of float32 masters in bfloat16. The copy is made a second time instead; the numbers are the same.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """`x` `[..., in]`, `weight` `[out, in]` to `[..., out]` of `dtype`."""
        narrow, ctx.x_dtype = x.to(dtype), x.dtype
        ctx.save_for_backward(narrow if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(narrow, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grads[0]
        grad_x = input_gradient(grad, weight).to(ctx.x_dtype) if needs_x else None
        grad_weight = weight_gradient(grad, x, weight.dtype) if needs_weight else None
        return grad_x, grad_weight, bias_gradient(grad, ctx.bias_dtype) if needs_bias else None, None


def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of a linear layer, in the type of its output's gradient `[..., out]`."""
    return grad @ weight.to(grad.dtype)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[out, in]` of the gradient `[..., out]` of a linear layer's output and its input `[..., in]`."""
    return (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(dtype)


def bias_gradient(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[out]` of the gradient `[..., out]` of a linear layer's output."""
    return grad.flatten(0, -2).sum(0).to(dtype)


def computing_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which a matrix product with `x` is computed here: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast_twice(model: nn.Module) -> None:
    """Let every plain linear layer of a model compute as `CastLinear` wherever autocast narrows its weight.

    One whose `forward` was taken over before stays as it is.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = types.MethodType(_linear, module)  # type: ignore[method-assign]


def _linear(self: Any, x: torch.Tensor) -> torch.Tensor:
    if torch.is_autocast_enabled(x.device.type):
        dtype = computing_dtype(x)
        if self.weight.is_floating_point() and self.weight.dtype.itemsize > dtype.itemsize:
            y: torch.Tensor = CastLinear.apply(x, self.weight, self.bias, dtype)
            return y
    return F.linear(x, self.weight, self.bias)
