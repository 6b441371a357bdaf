"""Which requests run in the next step, and which KV blocks are theirs. Plain Python: decisions only.

A request is admitted when a row and all the blocks it can ever need are free, so nothing that runs has to be
put off for memory. Prompts are computed in chunks within a token budget; rows of one delta stand together.
"""

from collections import deque
from dataclasses import dataclass, field

from ftray.core.errors import RequestError
from ftray.engine.api import Request


@dataclass(eq=False)
class Sequence:
    """A request in the engine: its tokens so far and what it holds."""

    request: Request
    slot: int
    """Order of its delta among the loaded ones; 0 is the base."""
    tokens: list[int]
    """Prompt, then what was generated."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    row: int = -1
    """Its row in the block table while it runs."""
    blocks: list[int] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_ids)


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step: tokens `start` to `start + length` of it."""

    seq: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """True if the step reaches the sequence's last token, so that its logits are the next one's."""
        return self.start + self.length == len(self.seq.tokens)


class BlockPool:
    """KV blocks by number, each free or owned once."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Own `count` blocks."""
        assert count <= len(self._free), "more blocks taken than are free"
        return [self._free.pop() for _ in range(count)]

    def give(self, blocks: list[int]) -> None:
        """Return blocks."""
        self._free += blocks
        assert len(self._free) <= self.num_blocks, "a block was returned twice"


class Scheduler:
    """Admission, order and accounting.

    Args:
        max_num_seqs: rows in one step.
        max_batch_tokens: tokens in one step, over prompts and decoding together.
        num_blocks: KV blocks of all sequences together.
        block_size: tokens in one block.
        max_length: most tokens of a prompt and its answer.
    """

    def __init__(
        self, *, max_num_seqs: int, max_batch_tokens: int, num_blocks: int, block_size: int, max_length: int
    ) -> None:
        assert max_batch_tokens >= max_num_seqs, "a step must have room for one token of every row"
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.max_length = max_length
        self.max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}

    def add(self, request: Request, slot: int) -> Sequence:
        """Queue a request.

        Raises:
            RequestError: if it is empty, its id is taken, or it can never fit.
        """
        length = len(request.prompt_ids)
        if request.id in self._by_id:
            raise RequestError(f"id: {request.id!r} is already in the engine; use a new one", param="id")
        if not length:
            raise RequestError("prompt: it has no token; write something", param="prompt")
        total = length + request.sampling.max_tokens
        if total > self.max_length:
            raise RequestError(
                f"prompt: {length} tokens and max_tokens {request.sampling.max_tokens} exceed the"
                f" {self.max_length} tokens taken here; shorten one of them",
                code="context_length_exceeded",
                param="max_tokens",
            )
        if self._blocks_for(request) > self.pool.num_blocks:
            raise RequestError(
                f"prompt: {total} tokens are more than the KV cache holds"
                f" ({self.pool.num_blocks * self.block_size}); shorten it or raise `kv_cache_tokens`",
                code="context_length_exceeded",
                param="max_tokens",
            )
        seq = Sequence(request, slot, list(request.prompt_ids))
        self._by_id[request.id] = seq
        self._waiting.append(seq)
        return seq

    def schedule(self) -> list[Row]:
        """Rows of the next step, sorted by delta slot. `advance` must follow once it has run."""
        self._admit()
        # One token is set aside for every running row, so a long prompt never stalls those that decode. The rest
        # goes out in order of arrival, whatever the delta.
        spare = self._max_batch_tokens - len(self._running)
        rows = []
        for seq in self._running:
            due = len(seq.tokens) - seq.computed
            length = min(due, 1 + spare)
            spare -= length - 1
            rows.append(Row(seq, seq.computed, length))
        return sorted(rows, key=lambda row: row.seq.slot)

    def advance(self, rows: list[Row]) -> None:
        """Note that a step's keys and values are in the cache."""
        for row in rows:
            row.seq.computed += row.length

    def get(self, request_id: str) -> Sequence | None:
        """The sequence of a request, if it is here."""
        return self._by_id.get(request_id)

    def finish(self, seq: Sequence) -> None:
        """Forget a sequence, waiting or running, and free what it holds."""
        del self._by_id[seq.request.id]
        if seq.row < 0:
            self._waiting.remove(seq)
            return
        self._running.remove(seq)
        self.pool.give(seq.blocks)
        self._free_rows.append(seq.row)
        seq.blocks, seq.row = [], -1

    def sequences(self) -> list[Sequence]:
        """Everything that waits or runs."""
        return list(self._by_id.values())

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing yet."""
        return len(self._waiting)

    def _admit(self) -> None:
        # First come, first served: a large request at the head is not overtaken for ever by small ones.
        while self._waiting and self._free_rows:
            seq = self._waiting[0]
            need = self._blocks_for(seq.request)
            if need > self.pool.num_free:
                return
            self._waiting.popleft()
            seq.blocks = self.pool.take(need)
            seq.row = self._free_rows.pop()
            self._running.append(seq)

    def _blocks_for(self, request: Request) -> int:
        # The last token generated is never fed back, so its keys and values need no place.
        return -(-(len(request.prompt_ids) + request.sampling.max_tokens - 1) // self.block_size)
