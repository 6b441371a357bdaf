"""Weighted cross-entropies through a plain head without a `[tokens, vocabulary]` tensor.

The gradients are made in the forward pass while a chunk's logits are there (as in Liger Kernel, Hsu et al.,
arXiv:2410.10989), so no logits are kept or computed twice. A chunk's logits stay in the type of the product; strip
by strip, each small enough for a core's cache, they become float32, give a loss, and are put back as its gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch

CHUNK_BYTES = 16 << 20
"""Logits of one chunk, in the type they are computed in."""
_STRIP_ELEMENTS = 1 << 18
_LEAST_ROWS = 256
"""Rows of a chunk at least, where the head trains: each chunk adds to all of the head's gradient."""
_PRODUCT_ROWS = 4096
"""Rows of the head's gradient added at once: adding bfloat16 to float32 copies what is added."""


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
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight: torch.Tensor | None = None
        assert len(sizes) == 1 or not needs_weight, "a head's gradient is that of one loss"
        losses_T = torch.zeros(len(labels_T), dtype=torch.float32, device=hidden_TD.device)
        head_VD = weight_VD.to(dtype)
        size = max(_LEAST_ROWS if needs_weight else 1, CHUNK_BYTES // (len(head_VD) * head_VD.itemsize))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(labels_T), size):
                part = slice(start, start + size)
                hidden_CD = hidden_TD[part].to(dtype)
                logits_CV = hidden_CD @ head_VD.T
                losses_T[part] = loss_to_gradient(logits_CV, labels_T[part], weights_T[part])
                if grad_hidden is not None:
                    grad_hidden[part] = logits_CV @ head_VD
                if needs_weight:
                    grad_weight = _add_product(grad_weight, logits_CV.T, hidden_CD)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight_VD)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.sizes = weight_VD.dtype, sizes
        return torch.stack([losses.sum() for losses in losses_T.split(list(sizes))])

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        """The gradients of the forward pass, times the losses' own."""
        (grad_S,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            for part, grad in zip(grad_hidden.split(list(ctx.sizes)), grad_S, strict=True):
                part.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype).mul_(grad_S[0])
        return grad_hidden, grad_weight, None, None, None


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


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total + left @ right`; the first product stays in its own type, a sum is float32."""
    if total is None:
        return left @ right
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    total = total.float()
    for start in range(0, len(left), _PRODUCT_ROWS):
        part = slice(start, start + _PRODUCT_ROWS)
        total[part] += left[part] @ right
    return total
