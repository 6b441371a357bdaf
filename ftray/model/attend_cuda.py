"""Causal attention inside documents on a GPU: one kernel for the whole row.

Flash attention for rows of variable-length sequences where its kernel takes the numbers (Dao, arXiv:2307.08691,
through `torch.nn.attention.varlen`), else FlexAttention with a mask that is sparse in blocks (Dong et al.,
arXiv:2412.05496).
"""

import functools
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from ftray.model.documents import facts

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_HEAD_DIM = 256


def attend(
    query_HND: torch.Tensor,
    key_KND: torch.Tensor,
    value_KND: torch.Tensor,
    bounds: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of `H` query heads over `K` key/value heads, `[N, H, D]`.

    Args:
        query_HND: queries; all three in the type to compute in.
        key_KND: keys.
        value_KND: values.
        bounds: where documents begin, and N at the end, `[documents + 1]` int32 on the device.
        scaling: of the scores.
        window: keys a query sees, itself included; None: all before it.
        softcap: scores are bent to stay below it.
    """
    if takes_flash(query_HND, softcap):
        return _flash(query_HND, key_KND, value_KND, bounds, scaling, window)
    return _flex(query_HND, key_KND, value_KND, bounds, scaling, window, softcap)


def takes_flash(query: torch.Tensor, softcap: float | None) -> bool:
    """True if the flash kernel computes this."""
    return query.dtype in _FLASH_DTYPES and query.shape[-1] <= _FLASH_HEAD_DIM and softcap is None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = facts(bounds).longest
    before = -1 if window is None else window - 1
    out: Any = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(before, 0),
        enable_gqa=len(query) != len(key),
    )
    return out


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    def bend(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap  # type: ignore[operator]

    out = _flex_kernel(query.device.type)(
        query[None],
        key[None],
        value[None],
        score_mod=None if softcap is None else bend,
        block_mask=facts(bounds).mask(window),
        scale=scaling,
        enable_gqa=len(query) != len(key),
    )
    return out[0].transpose(0, 1)


@functools.cache
def _flex_kernel(device: str) -> Any:
    """Compiled where it is worth it: without a compiler FlexAttention holds all scores."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
