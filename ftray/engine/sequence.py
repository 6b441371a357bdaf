"""An answer in the engine, and its share of a step. Plain Python."""

from dataclasses import dataclass, field
from typing import Any

from ftray.engine.prefix import chain_next
from ftray.engine.request import Request


@dataclass(eq=False)
class Sequence:
    """One answer to a request: its tokens so far and what it holds."""

    request: Request
    slot: int
    """Order of its delta among those in place, while it runs; 0 is the base. Rows are sorted by it."""
    tokens: list[int]
    """Prompt, then what was generated."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    row: int = -1
    """Its row in the block table while it runs."""
    blocks: list[int] = field(default_factory=list)
    index: int = 0
    """Which of the request's answers."""
    delta: Any = None
    """What it is answered by; the scheduler hands it on unseen."""
    group: int = 0
    """Rows of different groups never share a step; 0 is that of all deltas that can share one."""
    num_placed: int = 0
    """Leading blocks that stand in the runner's block table."""
    num_shared: int = 0
    """Leading blocks that came from the prefix cache, written by others: they must not be cleared."""
    num_cached: int = 0
    """Prompt tokens that came from the prefix cache when it was first admitted."""
    seed: bytes | None = None
    """Name that stands before its first block; None keeps it out of the prefix cache."""
    names: list[bytes] = field(default_factory=list)
    """Names of its full blocks, as far as they were asked for."""
    peak: int = 0
    """Most tokens that were ever in the cache: those below are computed again after a preemption."""
    order: tuple[int, int] = (0, 0)
    """Place in its tenant's queue: priority, then arrival."""

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def block_names(self, count: int, block_size: int) -> list[bytes]:
        """Names of the first `count` full blocks; none for one that is not cached."""
        if self.seed is None:
            return []
        while len(self.names) < count:
            at = len(self.names) * block_size
            before = self.names[-1] if self.names else self.seed
            self.names.append(chain_next(before, self.tokens[at : at + block_size]))
        return self.names[:count]


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
