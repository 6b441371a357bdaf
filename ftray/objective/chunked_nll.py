"""Weighted cross-entropies through a plain head without a `[tokens, vocabulary]` tensor.

The gradients are made while a chunk's logits are there (as in Liger Kernel, Hsu et al., arXiv:2410.10989), so no
logits are computed twice. A chunk's logits stay in the type of the product; strip by strip, each small enough for a
core's cache, they become float32, give a loss, and are put back as its gradient.

Where one chunk holds all targets, nothing of the head's size is made but its gradient: the weight is cast a strip
of rows at a time, and the gradient of the logits waits for the backward pass, which adds its product strip by strip
to the gradient that the weight has already.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ftray.model.accumulate import adds_only

CHUNK_BYTES = 16 << 20
"""Logits of one chunk, in the type they are computed in."""
_STRIP_ELEMENTS = 1 << 18
_LEAST_ROWS = 256
"""Rows of a chunk at least, where the head trains: each chunk adds to all of the head's gradient."""
_HEAD_ROWS = 2048
"""Rows of the head cast, or added to its gradient, at once."""


class ChunkedNLL(torch.autograd.Function):
    """Sums of weighted negative log-likelihoods of labels `[T]` given hidden states `[T, D]` and a head `[V, D]`.

    The tokens are those of `S` losses, of which each has the next `sizes[s]`; more than one only where the head is
    frozen. The backward pass can be taken once: it scales the gradients in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        weights_T: torch.Tensor,
        sizes: Sequence[int],
    ) -> torch.Tensor:
        """`[S]` float32."""
        device = hidden_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        assert len(sizes) == 1 or not needs_weight, "a head's gradient is that of one loss"
        size = max(_LEAST_ROWS if needs_weight else 1, CHUNK_BYTES // (len(weight_VD) * dtype.itemsize))
        one = len(labels_T) <= size
        head_VD = weight_VD if one else weight_VD.to(dtype)  # many chunks would each cast it
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight = torch.zeros(weight_VD.shape, device=device) if needs_weight and not one else None
        losses_T = torch.zeros(len(labels_T), dtype=torch.float32, device=hidden_TD.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, max(1, len(labels_T)), size):
                part = slice(start, start + size)
                hidden_CD = hidden_TD[part].to(dtype)
                logits_CV = _logits(hidden_CD, head_VD)
                losses_T[part] = loss_to_gradient(logits_CV, labels_T[part], weights_T[part])
                if grad_hidden is not None:
                    grad_hidden[part] = _back(logits_CV, head_VD)
                if grad_weight is not None:
                    for rows in _strips(len(grad_weight)):
                        grad_weight[rows] += logits_CV[:, rows].T @ hidden_CD
        ctx.save_for_backward(
            grad_hidden, grad_weight, *((logits_CV, hidden_CD) if one and needs_weight else ())
        )
        ctx.weight, ctx.sizes = weight_VD if needs_weight else None, sizes
        return torch.stack([losses.sum() for losses in losses_T.split(list(sizes))])

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        """The gradients of the forward pass, times the losses' own."""
        (grad_S,) = grads
        grad_hidden, grad_weight, *factors = ctx.saved_tensors
        if grad_hidden is not None:
            for part, grad in zip(grad_hidden.split(list(ctx.sizes)), grad_S, strict=True):
                part.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_S[0]).to(ctx.weight.dtype)
        elif factors:
            grad_CV, hidden_CD = factors
            grad_weight = _weight_gradient(ctx.weight, grad_CV, hidden_CD, grad_S[0])
        return grad_hidden, grad_weight, None, None, None


def _strips(rows: int) -> Iterator[slice]:
    return (slice(start, start + _HEAD_ROWS) for start in range(0, rows, _HEAD_ROWS))


def _logits(hidden_CD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """`[C, V]` in the type of the hidden states."""
    if head_VD.dtype == hidden_CD.dtype:
        return hidden_CD @ head_VD.T
    logits_CV = hidden_CD.new_empty(len(hidden_CD), len(head_VD))
    for rows in _strips(len(head_VD)):
        torch.mm(hidden_CD, head_VD[rows].to(hidden_CD.dtype).T, out=logits_CV[:, rows])
    return logits_CV


def _back(grad_CV: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Gradient of the hidden states `[C, D]`."""
    if head_VD.dtype == grad_CV.dtype:
        return grad_CV @ head_VD
    total = torch.zeros(len(grad_CV), head_VD.shape[1], device=grad_CV.device)
    for rows in _strips(len(head_VD)):
        total += grad_CV[:, rows] @ head_VD[rows].to(grad_CV.dtype)
    return total


def _weight_gradient(
    weight_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor | None:
    """The head's gradient, or None if it was added to the one that the head has."""
    adds = adds_only(weight_VD)
    shape = grad_CV.shape[1], hidden_CD.shape[1]
    total = weight_VD.grad if adds else torch.empty(shape, dtype=weight_VD.dtype, device=grad_CV.device)
    assert total is not None
    put = torch.Tensor.add_ if adds else torch.Tensor.copy_
    for rows in _strips(len(total)):
        put(total[rows], (grad_CV[:, rows].T @ hidden_CD).float().mul_(scale))
    return None if adds else total


def loss_to_gradient(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor
) -> torch.Tensor:
    """The weighted losses `[C]` of a chunk; its logits become their gradient, `weight (softmax - one-hot)`."""
    losses_C = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    rows = max(1, _STRIP_ELEMENTS // logits_CV.shape[1]) if logits_CV.device.type == "cpu" else len(logits_CV)
    for start in range(0, len(logits_CV), rows):
        part = slice(start, start + rows)
        label_R, weight_R = labels_C[part, None], weights_C[part, None]
        strip_RV = logits_CV[part].float()
        strip_RV -= strip_RV.amax(1, keepdim=True)
        picked_R = strip_RV.gather(1, label_R)
        sum_R = strip_RV.exp_().sum(1, keepdim=True)
        losses_C[part] = ((sum_R.log() - picked_R) * weight_R)[:, 0]
        strip_RV.mul_(weight_R / sum_R).scatter_add_(1, label_R, -weight_R)
        if strip_RV.data_ptr() != logits_CV[part].data_ptr():
            logits_CV[part] = strip_RV
    return losses_C
