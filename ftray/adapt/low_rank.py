"""A frozen linear layer and low-rank updates of it as one autograd node."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Update(NamedTuple):
    """One adapter's update of a contiguous stretch of tokens."""

    start: int
    stop: int
    scaling: float
    dropout: float = 0.0
    seed: int = 0
    """Of the dropout: the same tokens lose the same inputs, whatever else is in the pass, and again in backward."""


class LowRankLinear(torch.autograd.Function):
    """`y = W x + b`, and `+ s B A x` for the tokens of each update, with `W` and `b` frozen.

    One product with the base serves all tokens. An update is added inside its matrix product, forward and backward,
    so nothing as large as the layer's input or output is made twice; kept for backward are the input and `s A x`.
    Factors may be wider than the type that is computed in: they are cast down here, and their gradients go back in
    their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        updates: Sequence[Update],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """`x` `[..., in]` to `[..., out]`; `factors`: each update's `A` `[r, in]` and `B` `[out, r]` in turn."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        inners = []
        with torch.autocast(device, enabled=False):
            x = x.to(dtype)
            flat = x.flatten(0, -2)
            y = F.linear(flat, weight.to(dtype), None if bias is None else bias.to(dtype))
            for update, a, b in zip(updates, factors[::2], factors[1::2], strict=True):
                inner = (_input(flat, update) @ a.to(dtype).T).mul_(update.scaling)
                y[update.start : update.stop].addmm_(inner, b.to(dtype).T)
                inners.append(inner)
        ctx.save_for_backward(flat, weight, *inners, *factors)
        ctx.updates, ctx.shape = updates, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the input and of all factors."""
        flat, weight, *rest = ctx.saved_tensors
        updates: Sequence[Update] = ctx.updates
        inners, factors = rest[: len(updates)], rest[len(updates) :]
        dtype = flat.dtype
        grad = grads[0].to(dtype).flatten(0, -2)
        grad_x = grad @ weight.to(dtype) if ctx.needs_input_grad[0] else None
        found: list[torch.Tensor | None] = []
        for update, inner, a, b in zip(updates, inners, factors[::2], factors[1::2], strict=True):
            mine = slice(update.start, update.stop)
            grad_inner = (grad[mine] @ b.to(dtype)).mul_(update.scaling)
            if grad_x is not None and update.dropout:
                grad_x[mine].addcmul_(grad_inner @ a.to(dtype), kept(flat[mine], update.dropout, update.seed))
            elif grad_x is not None:
                grad_x[mine].addmm_(grad_inner, a.to(dtype))
            found.append((grad_inner.T @ _input(flat, update)).to(a.dtype) if a.requires_grad else None)
            found.append((grad[mine].T @ inner).to(b.dtype) if b.requires_grad else None)
        return (None if grad_x is None else grad_x.view(ctx.shape), None, None, None, *found)


def _input(flat: torch.Tensor, update: Update) -> torch.Tensor:
    mine = flat[update.start : update.stop]
    return mine * kept(mine, update.dropout, update.seed) if update.dropout else mine


def kept(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """What `x` is multiplied by in dropout: 0 with the probability `dropout`, else `1 / (1 - dropout)`."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)
