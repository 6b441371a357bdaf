"""Causal attention inside documents on a CPU, as a few batched matrix products a block of queries.

torch's fused kernel for CPUs multiplies small tiles one after another, in bfloat16 at a tenth of what the machine's
matrix product reaches. Here the heads that share keys and a block of queries make one product with all keys that
the block may see; the scores of a block are the largest thing held, and the backward pass makes them again.

Products in bfloat16 are rounded to it, which scores and their gradients would not bear: scores matter near the
row's maximum, gradients near the row's mean. Two columns beside queries and keys take maximum and mean off *inside*
the product, so that what is rounded is small where it counts.

oneDNN keeps half a megabyte for each shape of a product it has met. So a document's last block, of any length, is
computed as if it were a little longer, into tokens that follow: those keys are hidden, those queries thrown away.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

BLOCK = 128
"""Queries of one block: the part of the square above the diagonal that is computed for nothing is half of it."""
STEP = 32
"""Queries of a document's last block are computed in multiples of this, so that shapes are few."""
_SPARE = 8  # columns for the offsets; a multiple of eight keeps rows aligned

Block = tuple[int, int, int]


def blocks(lengths: Sequence[int], window: int | None) -> Iterator[Block]:
    """(first key, first query, past the last query and key) of each block of queries, in tokens of the row."""
    for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        for start in range(begin, end, BLOCK):
            first = begin if window is None else max(begin, start - window + 1)
            yield first, start, min(start + BLOCK, end)


def _end(start: int, stop: int) -> int:
    """Where a block ends as it is computed; may lie in what follows its document."""
    return start - (start - stop) // STEP * STEP


@functools.lru_cache(maxsize=512)
def _hidden(before: int, queries: int, groups: int, window: int | None) -> torch.Tensor:
    """True where a query must not see a key: `[queries * groups, keys]`, `before` keys ahead of the first query.

    Without a window only the keys from the first query on are covered; all keys before it are seen.
    """
    columns = torch.arange(0 if window is not None else before, before + queries)
    distance = (torch.arange(queries) + before)[:, None] - columns
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return hidden.repeat_interleave(groups, 0)


class BlockAttention(torch.autograd.Function):
    """Attention of `[H, N, D]` queries over `[K, N, D]` keys and values, each document apart; gives `[N, H, D]`."""

    @staticmethod
    def forward(
        ctx: Any,
        query_HND: torch.Tensor,
        key_KND: torch.Tensor,
        value_KND: torch.Tensor,
        lengths: Sequence[int],
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """`lengths` are the documents' and sum to `N`."""
        q, k, v = _by_key_head(query_HND, len(key_KND)), _wide(key_KND), _wide(value_KND)
        heads, total, dim = query_HND.shape
        groups = heads // len(k)
        out = torch.empty(total, len(k), groups, dim, dtype=q.dtype)
        for first, start, stop in blocks(lengths, window):
            end = _end(start, stop)
            rows = slice(start * groups, end * groups)
            scores = torch.bmm(q[:, rows, :dim], k[:, first:end, :dim].transpose(1, 2))
            # Of rows behind the document too, which the blocks that they belong to come and set.
            q[:, rows, dim] = -_masked(scores, first, start, end, groups, window).amax(-1)
            weights = _weights(q, k, first, start, end, groups, scaling, window)
            part = torch.bmm(weights, v[:, first:end, :dim]).unflatten(1, (-1, groups))
            out[start:stop] = part[:, : stop - start].transpose(0, 1)
        out = out.flatten(1, 2)
        ctx.save_for_backward(q, k, v, out)
        ctx.lengths, ctx.scaling, ctx.window = lengths, scaling, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Weights are computed again, a block at a time."""
        q, k, v, out = ctx.saved_tensors
        (total, heads, dim), window = out.shape, ctx.window
        groups = heads // len(k)
        grad = _by_key_head(grads[0].transpose(0, 1), len(k))
        # The mean of a row's gradient under its weights, in two parts for its lower bits.
        mean_NH = (grads[0].float() * out).sum(-1).neg_()
        mean = mean_NH.unflatten(1, (-1, groups)).transpose(0, 1).flatten(1)
        grad[:, : total * groups, dim] = mean
        grad[:, : total * groups, dim + 1] = mean - grad[:, : total * groups, dim]
        grad_q = torch.empty(*q.shape[:2], dim, dtype=q.dtype)
        grad_k, grad_v = (torch.zeros(*k.shape[:2], dim, dtype=torch.float32) for _ in range(2))
        for first, start, stop in blocks(ctx.lengths, window):
            end = _end(start, stop)
            rows, keys = slice(start * groups, end * groups), slice(first, end)
            weights = _weights(q, k, first, start, end, groups, ctx.scaling, window)
            weights[:, (stop - start) * groups :] = 0
            grad_v[:, keys] += torch.bmm(weights.transpose(1, 2), grad[:, rows, :dim])
            grad_scores = torch.bmm(grad[:, rows], v[:, keys].transpose(1, 2)).mul_(weights)
            torch.bmm(grad_scores, k[:, keys, :dim], out=grad_q[:, rows])
            grad_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows, :dim])
        grad_q = grad_q.unflatten(1, (-1, groups))[:, :total].transpose(1, 2).flatten(0, 1).mul_(ctx.scaling)
        grad_k, grad_v = grad_k[:, :total].mul_(ctx.scaling), grad_v[:, :total]
        return grad_q, grad_k.to(q.dtype), grad_v.to(q.dtype), None, None, None


def _by_key_head(query_HND: torch.Tensor, key_heads: int) -> torch.Tensor:
    """`[H, N, D]` to `[K, (N + STEP) * groups, D + spare]`: a block's queries lie together for each key head."""
    heads, total, dim = query_HND.shape
    out = torch.zeros(key_heads, total + STEP, heads // key_heads, dim + _SPARE, dtype=query_HND.dtype)
    out[:, :total, :, :dim] = query_HND.unflatten(0, (key_heads, -1)).transpose(1, 2)
    return out.flatten(1, 2)


def _wide(key_KND: torch.Tensor) -> torch.Tensor:
    """`[K, N + STEP, D + spare]`, ones in the two columns that multiply the offsets."""
    heads, total, dim = key_KND.shape
    out = torch.zeros(heads, total + STEP, dim + _SPARE, dtype=key_KND.dtype)
    out[:, :total, :dim] = key_KND
    out[..., dim : dim + 2] = 1
    return out


def _masked(
    scores: torch.Tensor, first: int, start: int, stop: int, groups: int, window: int | None
) -> torch.Tensor:
    # Without a window the mask is the same wherever the block lies, and need not be kept for each place.
    before = 0 if window is None else start - first
    hidden = _hidden(before, stop - start, groups, window)
    scores[..., scores.shape[-1] - hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    return scores


def _weights(
    q: torch.Tensor,
    k: torch.Tensor,
    first: int,
    start: int,
    stop: int,
    groups: int,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    scores = torch.bmm(q[:, start * groups : stop * groups], k[:, first:stop].transpose(1, 2))
    # Scaled now that they are small: queries scaled beforehand would be rounded once more.
    return torch.softmax(_masked(scores, first, start, stop, groups, window).mul_(scaling), -1)
