"""Cross-entropy without a `[tokens, vocabulary]` tensor.

Only target positions reach the head, a chunk at a time. For a plain head the gradients are made in the forward
pass while a chunk's logits are there (as in Liger Kernel, Hsu et al., arXiv:2410.10989), so no logits are kept
or computed twice; any other head is checkpointed chunk by chunk.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ftray.data.batch import Batch
from ftray.data.read import IGNORE_INDEX
from ftray.model.policy import Policy
from ftray.objective.chunked_nll import ChunkedNLL

_CHUNK_ELEMENTS = 1 << 22
"""Logits of one chunk: 16 MiB in float32."""


def target_weight(batch: Batch) -> float:
    """Sum of the weights of the batch's targets."""
    weights, labels = batch.weights[0, 1:], batch.labels[0, 1:]
    return float(weights[labels != IGNORE_INDEX].double().sum())


def select_targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions that predict a target, `[T]`, with the target's label and weight."""
    labels, weights = batch.labels[0, 1:], batch.weights[0, 1:]
    (where,) = torch.nonzero((labels != IGNORE_INDEX) & (weights != 0), as_tuple=True)
    return where, labels[where], weights[where]


def weighted_nll(policy: Policy, batch: Batch) -> torch.Tensor:
    """Sum over targets of weight times negative log-likelihood, a float32 scalar."""
    return policy.of_batch(_weighted_nlls, batch)


def _weighted_nlls(policy: Policy, batches: Sequence[Batch]) -> Sequence[torch.Tensor]:
    # Without a target, too, every weight takes part and gets a zero gradient: ranks that share weights must agree
    # on which of them have one.
    chosen = [select_targets(batch) for batch in batches]
    hidden = [policy.hidden(batch)[where] for batch, (where, _, _) in zip(batches, chosen, strict=True)]
    weight_VD = policy.head.plain_weight
    if weight_VD is not None:
        labels_T, weights_T = (torch.cat([targets[part] for targets in chosen]) for part in (1, 2))
        hidden_TD = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
        sizes = [len(where) for where, _, _ in chosen]
        losses_S: torch.Tensor = ChunkedNLL.apply(hidden_TD, weight_VD, labels_T, weights_T, sizes)
        return losses_S.unbind(0)
    return [
        torch.stack(over_chunks(policy, _nll_of_chunk, hidden_TD, labels_T, weights_T)).sum()
        for hidden_TD, (_, labels_T, weights_T) in zip(hidden, chosen, strict=True)
    ]


def document_targets(batch: Batch) -> torch.Tensor:
    """Sum of the target weights of each document, `[D]` float32."""
    weights = torch.where(batch.labels[0] == IGNORE_INDEX, 0.0, batch.weights[0])
    total = torch.zeros(len(batch.cu_seq_lens) - 1, dtype=torch.float32, device=weights.device)
    return total.index_add(0, _documents(batch, torch.arange(len(weights), device=weights.device)), weights)


def document_logps(policy: Policy, batch: Batch) -> torch.Tensor:
    """Sum over each document's targets of weight times log-probability, `[D]` float32."""
    hidden_ND = policy.hidden(batch)
    where, labels_T, weights_T = select_targets(batch)
    total = torch.zeros(len(batch.cu_seq_lens) - 1, dtype=torch.float32, device=where.device)
    logps_T = token_logps(policy, hidden_ND[where], labels_T)
    return total.index_add(0, _documents(batch, where + 1), logps_T * weights_T)


def _documents(batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """The document each token belongs to."""
    return torch.searchsorted(batch.cu_seq_lens.long(), tokens, right=True) - 1


def token_logps(policy: Policy, hidden_TD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Log-probability of each label given its hidden state, `[T]` float32."""
    weight_VD = policy.head.plain_weight
    if weight_VD is not None:
        logps_T: torch.Tensor = _ChunkedLogps.apply(hidden_TD, weight_VD, labels_T)
        return logps_T
    return torch.cat(over_chunks(policy, _logps_of_chunk, hidden_TD, labels_T))


def over_chunks(policy: Policy, function: Any, hidden_TD: torch.Tensor, *others: torch.Tensor) -> list[Any]:
    """`function(head, hidden_CD, *others_C)` on chunks of the targets, each computed again in backward."""
    size = max(1, _CHUNK_ELEMENTS // policy.model.config.get_text_config().vocab_size)
    parts = zip(hidden_TD.split(size), *(other.split(size) for other in others), strict=True)
    return [checkpoint(function, policy.head, *part, use_reentrant=False) for part in parts]


def _nll_of_chunk(
    head: Any, hidden_CD: torch.Tensor, target_C: torch.Tensor, weight_C: torch.Tensor
) -> torch.Tensor:
    return (F.cross_entropy(head(hidden_CD), target_C, reduction="none") * weight_C).sum()


def _logps_of_chunk(head: Any, hidden_CD: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(head(hidden_CD), target_C, reduction="none")


class _ChunkedLogps(torch.autograd.Function):
    """Log-probabilities of labels through a plain `[V, D]` head, chunk by chunk.

    How much each counts is known in backward only, so the logits of a chunk are computed there again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor
    ) -> torch.Tensor:
        device = hidden_TD.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T)
        size, head_VD = max(1, _CHUNK_ELEMENTS // weight_VD.shape[0]), weight_VD.to(ctx.dtype)
        parts = []
        with torch.autocast(device, enabled=False):
            for hidden_CD, label_C in zip(hidden_TD.split(size), labels_T.split(size), strict=True):
                logits_CV = (hidden_CD.to(ctx.dtype) @ head_VD.T).float()
                parts.append(logits_CV.gather(1, label_C[:, None])[:, 0] - torch.logsumexp(logits_CV, 1))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden_TD, weight_VD, labels_T = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        size, head_VD = max(1, _CHUNK_ELEMENTS // weight_VD.shape[0]), weight_VD.to(ctx.dtype)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for start in range(0, len(labels_T), size):
                stop = start + size
                hidden_CD = hidden_TD[start:stop].to(ctx.dtype)
                label_C, grad_C = labels_T[start:stop, None], grads[0][start:stop, None]
                # d log p / d logits = one-hot - softmax.
                grad_CV = torch.softmax((hidden_CD @ head_VD.T).float(), 1).mul_(-grad_C)
                grad_CV = grad_CV.scatter_add_(1, label_C, grad_C).to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[start:stop] = grad_CV @ head_VD
                if grad_weight is not None:
                    grad_weight += grad_CV.T @ hidden_CD
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None
