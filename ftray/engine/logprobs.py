"""Log-probabilities of tokens, and of the most likely ones beside them."""

from collections.abc import Sequence

import torch

from ftray.engine.request import TokenLogprob

_CHUNK = 128
"""Rows whose whole distribution is held in float32 at once."""


def token_logprobs(
    logits_NV: torch.Tensor, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprob]:
    """Log-probabilities (natural logarithm) of one token for each row of logits.

    Args:
        logits_NV: the model's logits, any float type.
        tokens: a token per row.
        num_top: how many of the most likely tokens to report per row.
    """
    found: list[TokenLogprob] = []
    for at in range(0, len(tokens), _CHUNK):
        part = slice(at, at + _CHUNK)
        found += _chunk(logits_NV[part].float(), tokens[part], num_top[part])
    return found


def _chunk(logits_NV: torch.Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    wanted_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    chosen = (logits_NV.gather(1, wanted_N1) - total_N1)[:, 0].tolist()
    if not (most := min(max(num_top), logits_NV.shape[1])):
        return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    values_NK, order_NK = logits_NV.topk(most, dim=-1)
    tops = zip(order_NK.tolist(), (values_NK - total_N1).tolist(), num_top, strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, (ids, values, count) in zip(tokens, chosen, tops, strict=True)
    ]
