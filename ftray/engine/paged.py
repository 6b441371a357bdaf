"""Attention over a paged KV cache, registered with transformers so that any model graph can use it.

Registered for attention alone, not for masks: the model then builds no mask, and who may see whom is decided
here from the step's layout. Keys and values lie in blocks of a shared pool (Kwon et al., arXiv:2309.06180).
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface

from ftray.engine.attend import How, decode, native_takes, prefill
from ftray.engine.sequence import Row, Sequence

NAME = "ftray_paged"


class Layer(NamedTuple):
    """One layer's part of the cache."""

    keys: torch.Tensor
    """`[slots, K, D]`, block after block."""
    values: torch.Tensor
    native: bool
    """True if the native kernel reads it, which looks at nothing but what belongs to a row."""


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
        self._layers: dict[int, Layer] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        """A layer's caches, shaped like its `key` and `value` `[1, K, T, D]`."""
        if index not in self._layers:
            slots = (self.num_blocks + 1) * self.block_size
            keys = key.new_zeros(slots, key.shape[1], key.shape[3])
            values = value.new_zeros(slots, value.shape[1], value.shape[3])
            self._layers[index] = Layer(keys, values, native_takes(keys, values))
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
        for layer in self._layers.values() if len(fresh) else ():
            for part in () if layer.native else layer[:2]:
                part.view(-1, self.block_size, *part.shape[1:]).index_fill_(0, fresh, 0)
        seq.num_placed = len(seq.blocks)

    def slots(self, row: int, length: int) -> torch.Tensor:
        """Where the first `length` tokens of a row lie in the flat caches."""
        blocks = self.table[row, : -(-length // self.block_size)]
        within = torch.arange(self.block_size, device=blocks.device)
        return (blocks[:, None] * self.block_size + within).view(-1)[:length]


class Prompt:
    """A row of the step with several tokens: `[first, first + length)` of the flattened token axis."""

    def __init__(self, cache: KVCache, row: Row, first: int) -> None:
        self.first, self.length = first, row.length
        self.start = row.start
        """Tokens of the sequence before these."""
        self._cache, self._row = cache, row.seq.row
        self._masks: dict[int | None, torch.Tensor] = {}

    @functools.cached_property
    def slots(self) -> torch.Tensor:
        """Cache slots of all its tokens, `[start + length]`."""
        return self._cache.slots(self._row, self.start + self.length)

    def mask(self, window: int | None) -> torch.Tensor:
        """`[length, start + length]`, True where a token may look."""
        if window not in self._masks:
            total = self.start + self.length
            query = torch.arange(self.start, total, device=self._cache.device)[:, None]
            at = torch.arange(total, device=self._cache.device)[None]
            self._masks[window] = (at <= query) & (at > query - window) if window else at <= query
        return self._masks[window]


class Decoding:
    """The rows of a step that have one token each."""

    def __init__(self, cache: KVCache, rows: list[Row], places: list[int]) -> None:
        device = cache.device
        self._cache = cache
        self._rows = [row.seq.row for row in rows]
        self._lengths = [row.start + 1 for row in rows]
        self.longest = max(self._lengths)
        """Tokens that the longest row sees, its own included."""
        self.block_size = cache.block_size
        self.places_R = torch.tensor(places, dtype=torch.int64, device=device)
        """Where they stand on the token axis."""
        self.lengths_R = torch.tensor(self._lengths, dtype=torch.int64, device=device)
        """Tokens each row sees."""
        width = -(-self.longest // cache.block_size)
        self.blocks = cache.table[torch.tensor(self._rows, dtype=torch.int64, device=device), :width]
        """Blocks of each row, as many as the longest needs."""
        self._masks: dict[int | None, torch.Tensor] = {}

    @functools.cached_property
    def slots(self) -> list[torch.Tensor]:
        """Cache slots of each row's tokens."""
        return [self._cache.slots(row, length) for row, length in zip(self._rows, self._lengths, strict=True)]

    def mask(self, window: int | None) -> torch.Tensor:
        """`[rows, 1, 1, context]`, True where the new token of a row may look."""
        if window not in self._masks:
            context = self.blocks.shape[1] * self.block_size
            at = torch.arange(context, device=self._cache.device)[None]
            mask = at < self.lengths_R[:, None]
            if window:
                mask &= at >= self.lengths_R[:, None] - window
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


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
        firsts = [0, *itertools.accumulate(row.length for row in rows)]
        self.num_tokens = firsts[-1]
        placed = list(zip(rows, firsts, strict=False))
        self.prompts = [Prompt(cache, row, first) for row, first in placed if row.length > 1]
        single = [(row, first) for row, first in placed if row.length == 1]
        self.decoding = Decoding(cache, *map(list, zip(*single, strict=True))) if single else None


_STEP: ContextVar[Step] = ContextVar("ftray_paged_step")


@contextlib.contextmanager
def using(step: Step) -> Iterator[Step]:
    """Let the model's attention calls inside the block read and write through `step`."""
    token = _STEP.set(step)
    try:
        yield step
    finally:
        _STEP.reset(token)


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
    how = How(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    layer = step.cache.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    query_THD, key_TKD, value_TKD = (part[0].transpose(0, 1) for part in (query, key, value))
    layer.keys.index_copy_(0, step.write, key_TKD)
    layer.values.index_copy_(0, step.write, value_TKD)
    decoding = step.decoding
    if decoding and not step.prompts:
        return decode(decoding, query_THD, layer, how)[None], None
    output = query_THD.new_empty(step.num_tokens, query.shape[1], value.shape[3])
    if decoding:
        output[decoding.places_R] = decode(decoding, query_THD[decoding.places_R], layer, how)
    for prompt in step.prompts:
        span = slice(prompt.first, prompt.first + prompt.length)
        output[span] = prefill(prompt, query_THD[span], key_TKD[span], value_TKD[span], layer, how)
    return output[None], None


AttentionInterface.register(NAME, paged_attention)
