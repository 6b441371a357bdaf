"""Attention of one step's tokens over the paged cache: natively where it is built, in plain torch elsewhere."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ftray.engine import native

if TYPE_CHECKING:
    from ftray.engine.paged import Decoding, Layer, Prompt

# Above this context a gather padded to the longest row costs more than one call per row (CPU, 32 rows).
_PADDED_CONTEXT = 128
_LANES = 16
_NATIVE = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class How:
    """What a layer asks of its attention: softcap as in Gemma-2, sinks as in gpt-oss."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks_H: torch.Tensor | None

    @property
    def plain(self) -> bool:
        """True if scores become weights by a softmax and nothing else."""
        return self.softcap is None and self.sinks_H is None


def decode(decoding: "Decoding", query_RHD: torch.Tensor, layer: "Layer", how: How) -> torch.Tensor:
    """One new token per row over everything of its sequence: `[rows, H, D]`."""
    keys, values, native_takes = layer
    if native_takes:
        return torch.ops.ftray_engine.paged_decode(
            query_RHD.contiguous(),
            keys,
            values,
            decoding.blocks,
            decoding.lengths_R,
            decoding.block_size,
            how.scaling,
            how.window or 0,
            how.softcap or 0.0,
            how.sinks_H,
        )
    rows, heads, size = query_RHD.shape
    kv_heads = keys.shape[1]
    # The query heads of a key head stand as its query positions.
    query_RKGD = query_RHD.reshape(rows, kv_heads, heads // kv_heads, size)
    sinks = None if how.sinks_H is None else how.sinks_H.view(1, kv_heads, -1, 1)
    padded = decoding.longest <= _PADDED_CONTEXT or keys.device.type != "cpu"
    one_way = _decode_padded if padded else _decode_each
    return one_way(decoding, query_RKGD, keys, values, how, sinks).reshape(rows, heads, -1)


def prefill(
    prompt: "Prompt",
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    layer: "Layer",
    how: How,
) -> torch.Tensor:
    """A prompt's tokens over everything of their sequence up to themselves: `[length, H, D]`.

    `key_TKD` and `value_TKD` are those of the tokens themselves, which lie in the caches too.
    """
    if prompt.start:
        key_TKD, value_TKD = layer.keys[prompt.slots], layer.values[prompt.slots]
    groups = query_THD.shape[1] // key_TKD.shape[1]
    query = query_THD.transpose(0, 1)[None]
    mine = [part.transpose(0, 1)[None].repeat_interleave(groups, 1) for part in (key_TKD, value_TKD)]
    total = prompt.start + prompt.length
    window = how.window if how.window and how.window < total else None
    if not prompt.start and window is None and how.plain:
        output = F.scaled_dot_product_attention(query, mine[0], mine[1], is_causal=True, scale=how.scaling)
    else:
        sinks = None if how.sinks_H is None else how.sinks_H.view(1, -1, 1, 1)
        output = _attend(query, mine[0], mine[1], prompt.mask(window), how, sinks)
    return output[0].transpose(0, 1)


def native_takes(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """True if the native kernel is there and made for caches such as these."""
    return (
        keys.device.type == "cpu"
        and keys.dtype == values.dtype
        and keys.dtype in _NATIVE
        and not keys.shape[2] % _LANES
        and not values.shape[2] % _LANES
        and native.available()
    )


def _decode_padded(
    decoding: "Decoding",
    query_RKGD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    how: How,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    rows, kv_heads = query_RKGD.shape[:2]
    gathered = [
        part.view(-1, decoding.block_size, kv_heads, part.shape[2])[decoding.blocks]
        .view(rows, -1, kv_heads, part.shape[2])
        .transpose(1, 2)
        for part in (keys, values)
    ]
    return _attend(query_RKGD, gathered[0], gathered[1], decoding.mask(how.window), how, sinks)


def _decode_each(
    decoding: "Decoding",
    query_RKGD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    how: How,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    outputs = []
    for row, slots in enumerate(decoding.slots):
        seen = slots[-how.window :] if how.window else slots
        mine = [part[seen].transpose(0, 1)[None] for part in (keys, values)]
        outputs.append(_attend(query_RKGD[row : row + 1], mine[0], mine[1], None, how, sinks))
    return torch.cat(outputs)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    how: How,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, H, Q, D]` over `[B, H, L, D]`."""
    if how.plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=how.scaling)
    scores = (query @ key.transpose(-1, -2)) * how.scaling
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    scores = scores.float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]].to(query.dtype)
    return weights @ value
