"""Attention over a paged KV cache, registered with transformers so that any model graph can use it.

Registered for attention alone, not for masks: the model then builds no mask, and who may see whom is decided
here from the step's layout. Keys and values lie in blocks of a shared pool (Kwon et al., arXiv:2309.06180).
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from ftray.engine.sequence import Row, Sequence

NAME = "ftray_paged"

# Above this context a gather padded to the longest row costs more than one call per row (CPU, 32 rows).
_PADDED_CONTEXT = 128


class KVCache:
    """Keys and values of every layer, in blocks; and the table of which blocks a row holds.

    Layers are allocated when they are first met, with the heads and sizes they bring. One block more than the
    pool has stays zero: it fills the table where a row has no block.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_rows: int, max_length: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.device = device
        width = -(-max_length // block_size)
        self.table = torch.full((num_rows, width), num_blocks, dtype=torch.int64, device=device)
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat caches `[slots, K, D]` of a layer, shaped like its `key` and `value` `[1, K, T, D]`."""
        if index not in self._layers:
            slots = (self.num_blocks + 1) * self.block_size
            self._layers[index] = (
                key.new_zeros(slots, key.shape[1], key.shape[3]),
                value.new_zeros(slots, value.shape[1], value.shape[3]),
            )
        return self._layers[index]

    def place(self, seq: Sequence) -> None:
        """Put the blocks a sequence was given since its last step into its row of the table.

        Those written by others, a shared prefix, stay as they are; the rest is cleared: what an earlier owner left
        (even NaN) must not reach the new one.
        """
        first = seq.num_placed
        if first == len(seq.blocks):
            return
        mine = torch.tensor(seq.blocks[first:], dtype=torch.int64, device=self.device)
        if not first:
            self.table[seq.row].fill_(self.num_blocks)
        self.table[seq.row, first : len(seq.blocks)] = mine
        fresh = mine[max(0, seq.num_shared - first) :]
        for cache in self._layers.values() if len(fresh) else ():
            for part in cache:
                part.view(-1, self.block_size, *part.shape[1:]).index_fill_(0, fresh, 0)
        seq.num_placed = len(seq.blocks)


@dataclass(frozen=True)
class Prompt:
    """A row of the step with several tokens: `[first, first + length)` of the flattened token axis."""

    first: int
    length: int
    start: int
    """Tokens of the sequence before these."""
    slots: torch.Tensor
    """Cache slots of all its tokens, `[start + length]`."""


class Step:
    """One step's layout, built once and read by every layer."""

    def __init__(self, cache: KVCache, rows: list[Row]) -> None:
        self.cache = cache
        self.calls = 0
        size, device = cache.block_size, cache.device
        positions = [at for row in rows for at in range(row.start, row.start + row.length)]
        table_rows = [row.seq.row for row in rows for _ in range(row.length)]
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        owner = torch.tensor(table_rows, dtype=torch.int64, device=device)
        self.write = cache.table[owner, self.positions // size] * size + self.positions % size
        self.prompts: list[Prompt] = []
        first, decoding = 0, []
        for row in rows:
            if row.length == 1:
                decoding.append((first, row))
            else:
                slots = self._slots(row.seq.row, row.start + row.length)
                self.prompts.append(Prompt(first, row.length, row.start, slots))
            first += row.length
        self.num_tokens = first
        self._set_decoding(decoding)
        self._masks: dict[Any, torch.Tensor] = {}

    def _set_decoding(self, decoding: list[tuple[int, Row]]) -> None:
        device = self.cache.device
        self.lengths = [row.start + 1 for _, row in decoding]
        self.decode_tokens = torch.tensor([at for at, _ in decoding], dtype=torch.int64, device=device)
        self.decode_slots: list[torch.Tensor] = []
        if not decoding:
            return
        self.padded = max(self.lengths) <= _PADDED_CONTEXT or device.type != "cpu"
        if not self.padded:
            self.decode_slots = [self._slots(row.seq.row, row.start + 1) for _, row in decoding]
            return
        width = -(-max(self.lengths) // self.cache.block_size)
        rows = torch.tensor([row.seq.row for _, row in decoding], dtype=torch.int64, device=device)
        self.decode_blocks = self.cache.table[rows, :width]
        self.decode_lengths = torch.tensor(self.lengths, dtype=torch.int64, device=device)

    def _slots(self, row: int, length: int) -> torch.Tensor:
        size = self.cache.block_size
        blocks = self.cache.table[row, : -(-length // size)]
        within = torch.arange(size, device=blocks.device)
        return (blocks[:, None] * size + within).view(-1)[:length]

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """`[rows, 1, 1, context]`, True where the new token of a row may look."""
        key = ("decode", window)
        if key not in self._masks:
            context = self.decode_blocks.shape[1] * self.cache.block_size
            at = torch.arange(context, device=self.cache.device)[None]
            mask = at < self.decode_lengths[:, None]
            if window:
                mask &= at >= self.decode_lengths[:, None] - window
            self._masks[key] = mask[:, None, None]
        return self._masks[key]

    def prompt_mask(self, prompt: Prompt, window: int | None) -> torch.Tensor:
        """`[length, start + length]`, True where a token of a prompt may look."""
        key = (prompt.first, window)
        if key not in self._masks:
            total = prompt.start + prompt.length
            query = torch.arange(prompt.start, total, device=self.cache.device)[:, None]
            at = torch.arange(total, device=self.cache.device)[None]
            self._masks[key] = (at <= query) & (at > query - window) if window else at <= query
        return self._masks[key]


_STEP: ContextVar[Step] = ContextVar("ftray_paged_step")


@contextlib.contextmanager
def using(step: Step) -> Iterator[Step]:
    """Let the model's attention calls inside the block read and write through `step`."""
    token = _STEP.set(step)
    try:
        yield step
    finally:
        _STEP.reset(token)


@dataclass(frozen=True)
class _How:
    """What a layer asks of its attention."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks_H: torch.Tensor | None


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' signature: query `[1, H, T, D]`, key and value `[1, K, T, D]` -> `[1, T, H, D]`."""
    if attention_mask is not None or position_bias is not None:
        raise NotImplementedError("the model decides in a mask or bias of its own who may see whom")
    step = _STEP.get()
    step.calls += 1
    how = _How(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    keys, values = step.cache.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    keys.index_copy_(0, step.write, key[0].transpose(0, 1))
    values.index_copy_(0, step.write, value[0].transpose(0, 1))
    query_THD = query[0].transpose(0, 1)
    if not step.prompts:
        return _decode(step, query_THD, keys, values, how)[None], None
    output = query_THD.new_empty(step.num_tokens, query.shape[1], value.shape[3])
    if step.lengths:
        output[step.decode_tokens] = _decode(step, query_THD[step.decode_tokens], keys, values, how)
    for prompt in step.prompts:
        stop = prompt.first + prompt.length
        part = query_THD[prompt.first : stop]
        output[prompt.first : stop] = _prefill(step, prompt, part, keys, values, how)
    return output[None], None


def _decode(
    step: Step, query_THD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: _How
) -> torch.Tensor:
    """One new token per row, `[rows, H, D]`; the query heads of a key head stand as its query positions."""
    rows, heads, size = query_THD.shape
    kv_heads = keys.shape[1]
    query_RKGD = query_THD.reshape(rows, kv_heads, heads // kv_heads, size)
    sinks = None if how.sinks_H is None else how.sinks_H.view(1, kv_heads, -1, 1)
    if step.padded:
        blocks = step.decode_blocks
        gathered = [
            part.view(-1, step.cache.block_size, kv_heads, part.shape[2])[blocks]
            .view(rows, -1, kv_heads, part.shape[2])
            .transpose(1, 2)
            for part in (keys, values)
        ]
        output = _attend(query_RKGD, gathered[0], gathered[1], step.decode_mask(how.window), how, sinks)
        return output.reshape(rows, heads, -1)
    outputs = []
    for row, slots in enumerate(step.decode_slots):
        seen = slots[-how.window :] if how.window else slots
        mine = [part[seen].transpose(0, 1)[None] for part in (keys, values)]
        outputs.append(_attend(query_RKGD[row : row + 1], mine[0], mine[1], None, how, sinks))
    return torch.cat(outputs).reshape(rows, heads, -1)


def _prefill(
    step: Step, prompt: Prompt, query_THD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: _How
) -> torch.Tensor:
    """A prompt's tokens, `[length, H, D]`, over everything of their sequence up to themselves."""
    groups = query_THD.shape[1] // keys.shape[1]
    query = query_THD.transpose(0, 1)[None]
    mine = [part[prompt.slots].transpose(0, 1)[None].repeat_interleave(groups, 1) for part in (keys, values)]
    total = prompt.start + prompt.length
    window = how.window if how.window and how.window < total else None
    if prompt.start == 0 and window is None and how.softcap is None and how.sinks_H is None:
        output = F.scaled_dot_product_attention(query, mine[0], mine[1], is_causal=True, scale=how.scaling)
    else:
        sinks = None if how.sinks_H is None else how.sinks_H.view(1, -1, 1, 1)
        output = _attend(query, mine[0], mine[1], step.prompt_mask(prompt, window), how, sinks)
    return output[0].transpose(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    how: _How,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, H, Q, D]` over `[B, H, L, D]`; softcap as in Gemma-2, sinks as in gpt-oss."""
    if how.softcap is None and sinks is None:
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


AttentionInterface.register(NAME, paged_attention)
