"""Which answers run in the next step, and which KV blocks are theirs. Plain Python: decisions only.

An answer is admitted when a row, its delta and blocks for its tokens so far are there; blocks are added as it
grows. When they run out, the latest answer of the tenant served most gives up its own and is computed again later;
when all rows are taken, a tenant that has none is given one by a tenant that has more than its share. Prompts are
computed in chunks within a budget of tokens and time; rows of one delta stand together.
"""

from collections import Counter

from ftray.core.errors import RequestError
from ftray.engine.blocks import BlockPool
from ftray.engine.fair import FairShares
from ftray.engine.pace import Pace
from ftray.engine.request import Request
from ftray.engine.sequence import Row, Sequence
from ftray.engine.waiting import Gate, Open, Queues

__all__ = ["BlockPool", "Gate", "Row", "Scheduler", "Sequence"]


class Scheduler:
    """Admission, order and accounting.

    Args:
        max_num_seqs: rows in one step.
        max_batch_tokens: tokens in one step, over prompts and decoding together.
        num_blocks: KV blocks of all sequences together.
        block_size: tokens in one block.
        max_length: most tokens of a prompt and its answer.
        pace: holds prompts back in steps in which answers decode; None: only `max_batch_tokens` does.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        num_blocks: int,
        block_size: int,
        max_length: int,
        pace: Pace | None = None,
    ) -> None:
        assert max_batch_tokens >= max_num_seqs, "a step must have room for one token of every row"
        self.pool = BlockPool(num_blocks)
        self.shares = FairShares()
        self.pace = pace
        self.gate: Gate = Open()
        self.block_size = block_size
        self.max_length = max_length
        self.max_num_seqs = max_num_seqs
        self.num_preempted = 0
        """Times blocks were given up to others."""
        self.num_recomputed = 0
        """Tokens computed again after that."""
        self.num_prompt = 0
        """Prompt tokens to compute, of all that was admitted."""
        self.num_cached = 0
        """Prompt tokens found in the cache."""
        self._max_batch_tokens = max_batch_tokens
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._waiting = Queues()
        self._running: list[Sequence] = []
        self._by_id: dict[str, list[Sequence]] = {}
        self._arrivals = 0
        self._turns: dict[int, int] = {}

    def check(self, request: Request) -> None:
        """Raise `RequestError` if a request is empty, its id is taken, or it can never fit."""
        length, new = len(request.prompt_ids), request.sampling.max_tokens
        if request.id in self._by_id:
            raise RequestError(f"id: {request.id!r} is already in the engine; use a new one", param="id")
        if not length:
            raise RequestError("prompt: it has no token; write something", param="prompt")
        if length + new > self.max_length:
            raise RequestError(
                f"prompt: {length} tokens and max_tokens {new} exceed the"
                f" {self.max_length} tokens taken here; shorten one of them",
                code="context_length_exceeded",
                param="max_tokens",
            )
        # The last token generated is never fed back, so its keys and values need no place.
        if self._num_blocks(max(length, length + new - 1)) > self.pool.num_blocks:
            raise RequestError(
                f"prompt: {length + new} tokens are more than the KV cache holds"
                f" ({self.pool.num_blocks * self.block_size}); shorten it or raise `kv_cache_tokens`",
                code="context_length_exceeded",
                param="max_tokens",
            )

    def add(self, request: Request, slot: int = 0) -> list[Sequence]:
        """Queue a request's answers.

        Args:
            request: what is asked.
            slot: order of its delta; a gate sets it again on entry, and the name of its prefix.

        Raises:
            RequestError: as `check`.
        """
        self.check(request)
        seqs = []
        for index in range(request.sampling.n):
            seq = Sequence(request, slot, list(request.prompt_ids), index=index)
            self._arrivals += 1
            seq.order = (request.priority, self._arrivals)
            seqs.append(seq)
            self._waiting.add(seq)
            self.shares.arrive(request.tenant, request.weight)
        self._by_id[request.id] = list(seqs)
        return seqs

    def schedule(self) -> list[Row]:
        """Rows of the next step, sorted by delta slot. `advance` must follow once it has run."""
        before = self.num_preempted
        self._grow()
        # Blocks just given up belong to those that needed them, not to the next in the queue.
        if self.num_preempted == before:
            self._admit()
            self._make_way()
        running = self._group()
        # One token is set aside for every running row, so a long prompt never stalls those that decode. The rest
        # goes to those who were served least, in order of arrival.
        spare = self._spare(running)
        rows = []
        for seq in sorted(running, key=self._claim):
            length = min(len(seq.tokens) - seq.computed, 1 + spare)
            spare -= length - 1
            rows.append(Row(seq, seq.computed, length))
        return sorted(rows, key=lambda row: row.seq.slot)

    def _spare(self, running: list[Sequence]) -> int:
        """Tokens of the next step beyond one of each row."""
        spare = self._max_batch_tokens - len(running)
        decoding = [seq.request.tenant for seq in running if seq.computed + 1 == len(seq.tokens)]
        if self.pace is None or not 0 < len(decoding) < len(running):
            return spare
        rows = Counter(seq.request.tenant for seq in running)
        due = self.shares.part(decoding, rows)
        return int(min(spare, self.pace.prompt_tokens(self.shares.part(rows.elements(), rows) / due - 1)))

    def advance(self, rows: list[Row]) -> None:
        """Note that a step's keys and values are in the cache."""
        for row in rows:
            seq = row.seq
            seq.computed += row.length
            self.num_recomputed += min(seq.peak, seq.computed) - min(seq.peak, row.start)
            # A prompt is charged for when it is admitted.
            first = max(seq.peak, len(seq.request.prompt_ids))
            self.shares.charge(seq.request.tenant, max(0, seq.computed - first))
            seq.peak = max(seq.peak, seq.computed)
            full = seq.computed // self.block_size
            for block, name in zip(seq.blocks, seq.block_names(full, self.block_size), strict=False):
                self.pool.name(block, name)

    def get(self, request_id: str) -> list[Sequence]:
        """The sequences of a request that are still here."""
        return list(self._by_id.get(request_id, ()))

    def finish(self, seq: Sequence) -> None:
        """Forget a sequence, waiting or running, and free what it holds."""
        siblings = self._by_id[seq.request.id]
        siblings.remove(seq)
        if not siblings:
            del self._by_id[seq.request.id]
        if seq.row >= 0:
            self._yield(seq)
        else:
            self._waiting.remove(seq)
        self.shares.leave(seq.request.tenant)

    def sequences(self) -> list[Sequence]:
        """Everything that waits or runs."""
        return [seq for seqs in self._by_id.values() for seq in seqs]

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing."""
        return len(self._waiting)

    def _claim(self, seq: Sequence) -> tuple[float, tuple[int, int]]:
        """Smaller goes first: the tenant served least, then its own order."""
        return self.shares.served(seq.request.tenant), seq.order

    def _grow(self) -> None:
        """Give every running sequence the blocks its tokens need, at the cost of those that come last."""
        for seq in sorted(self._running, key=self._claim):
            while seq.row >= 0 and len(seq.blocks) < self._num_blocks(len(seq.tokens)):
                if self.pool.num_free:
                    seq.blocks += self.pool.take(1)
                else:
                    self._preempt(max(self._running, key=self._claim))

    def _preempt(self, seq: Sequence) -> None:
        self.num_preempted += 1
        self._yield(seq)
        seq.computed = 0
        self._waiting.add(seq)

    def _yield(self, seq: Sequence) -> None:
        """Take row, blocks and delta from a running sequence."""
        self._running.remove(seq)
        self.pool.give(seq.blocks)
        self._free_rows.append(seq.row)
        seq.blocks, seq.row, seq.num_placed, seq.num_shared = [], -1, 0, 0
        self.gate.leave(seq)

    def _admit(self) -> None:
        for seq in self._waiting.candidates(self._claim):
            if not self._free_rows:
                return
            if not self.gate.enter(seq):
                continue
            # A large one at the head is not overtaken for ever by small ones.
            if not self._start(seq):
                self.gate.leave(seq)
                return

    def _make_way(self) -> None:
        """A row for each tenant that has none, from the tenant with most beyond its share; the one that lost least.

        Otherwise a tenant waits until somebody else's answer ends, however many rows that one has.
        """
        held = Counter(seq.request.tenant for seq in self._running)
        for seq in sorted(self._waiting.heads(), key=self._claim):
            tenant = seq.request.tenant
            most = max(
                held, key=lambda name: held[name] - self.shares.rows(name, self.max_num_seqs), default=""
            )
            if self._free_rows or not most or held[most] <= self.shares.rows(most, self.max_num_seqs):
                return
            behind = self.shares.served(tenant) <= self.shares.served(most)
            if held[tenant] or not behind or not self.gate.enter(seq):
                continue
            mine = [other for other in self._running if other.request.tenant == most]
            self._preempt(min(mine, key=lambda other: (other.computed, -other.order[1])))
            held[most] -= 1
            if not self._start(seq):
                self.gate.leave(seq)
                return
            held[tenant] += 1

    def _start(self, seq: Sequence) -> bool:
        """Give a sequence a row and blocks; False if there are too few."""
        shared = self.pool.find(seq.block_names(self._max_shared(seq), self.block_size))
        need = self._num_blocks(len(seq.tokens)) - len(shared)
        # Those that run may need a block each before one ends; taking them all now would only be undone.
        room = self.pool.num_free - self.pool.num_kept_of(shared) - len(self._running)
        if need > room and self._running:
            return False
        self._waiting.remove(seq)
        self.pool.share(shared)
        seq.blocks = shared + self.pool.take(need)
        seq.row = self._free_rows.pop()
        seq.num_shared = len(shared)
        seq.computed = len(shared) * self.block_size
        if not seq.peak:
            length = len(seq.request.prompt_ids)
            seq.num_cached = seq.computed
            self.num_cached += seq.computed
            self.num_prompt += length - seq.computed
            self.shares.charge(seq.request.tenant, length - seq.computed)
        seq.peak = max(seq.peak, seq.computed)
        self._running.append(seq)
        return True

    def _group(self) -> list[Sequence]:
        """The running sequences of one group: groups take turns."""
        groups = {seq.group for seq in self._running}
        if len(groups) <= 1:
            return self._running
        turn = min(sorted(groups), key=lambda group: self._turns.get(group, 0))
        latest = max(self._turns.values(), default=0)
        self._turns = {group: at for group, at in self._turns.items() if group in groups} | {turn: latest + 1}
        return [seq for seq in self._running if seq.group == turn]

    def _max_shared(self, seq: Sequence) -> int:
        """Most blocks to take from the cache: one token at least, and all whose logits are wanted, is computed."""
        sampling, last = seq.request.sampling, len(seq.tokens) - 1
        if sampling.prompt_logprobs is not None:
            last = min(last, max(0, sampling.prompt_logprobs_start - 1))
        return last // self.block_size

    def _num_blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
