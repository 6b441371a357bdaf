"""Attention for padding-free rows: every document attends to itself only.

Registered with transformers under `NAME` for attention alone, not for masks: the model then builds no
`[tokens, tokens]` mask, and the document boundaries arrive as `cu_seq_lens_q` through the model's keyword
arguments. How it is computed depends on the device and the type: blocks of queries on a CPU in bfloat16, one kernel
for the row on a GPU; elsewhere, and with sinks or dropout, one SDPA call a document, in float32 bit-equal to what
they give apart.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from ftray.model import attend_cuda
from ftray.model.attend_cpu import BlockAttention
from ftray.model.documents import facts

NAME = "ftray_packed"


def causal_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean `[length, length]` mask, True where a query (row) may see a key (column)."""
    offset = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (offset >= 0) if window is None else (offset >= 0) & (offset < window)


def attend(
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention inside one document; `H` query heads over `K` key/value heads. Returns `[H, T, D]`."""
    heads, length, _ = query_HTD.shape
    if window is not None and window >= length:
        window = None
    if softcap is None and sinks_H is None:
        mask = None if window is None else causal_mask(length, window, query_HTD.device)
        return F.scaled_dot_product_attention(
            query_HTD[None],
            key_KTD[None],
            value_KTD[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=heads != key_KTD.shape[0],
        )[0]
    groups = heads // key_KTD.shape[0]
    scores = query_HTD @ key_KTD.repeat_interleave(groups, 0).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~causal_mask(length, window, scores.device), float("-inf")).float()
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.float().view(heads, 1, 1).expand(-1, length, 1)], -1)
    weights = torch.softmax(scores, -1)[..., :length].to(query_HTD.dtype)
    return F.dropout(weights, dropout) @ value_KTD.repeat_interleave(groups, 0)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query `[1, H, N, D]`, key and value `[1, K, N, D]` -> `[1, N, H, D]`.

    `cu_seq_lens_q` `[documents + 1]` holds where each document starts; absent, all tokens are one document.
    """
    assert attention_mask is None and query.shape[0] == 1, "rows are padding-free: one row, no mask"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bounds = cu_seq_lens_q
    if bounds is None:
        bounds = torch.tensor([0, query.shape[2]], dtype=torch.int32, device=query.device)
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    plain = not dropout and s_aux is None
    q, k, v = (tensor[0].to(dtype) for tensor in (query, key, value))
    if plain and device == "cuda":
        settings: dict[str, Any] = {"scaling": scale, "window": sliding_window, "softcap": softcap}
        return attend_cuda.attend(q, k, v, bounds, **settings)[None], None
    lengths = facts(bounds).lengths
    if plain and device == "cpu" and dtype == torch.bfloat16 and softcap is None:
        return BlockAttention.apply(q, k, v, lengths, scale, sliding_window)[None], None
    documents = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    outputs = [
        attend(*parts, scaling=scale, dropout=dropout, window=sliding_window, softcap=softcap, sinks_H=s_aux)
        for parts in documents
    ]
    return torch.cat(outputs, 1).transpose(0, 1)[None], None


AttentionInterface.register(NAME, packed_attention)
