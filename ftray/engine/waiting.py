"""Answers that wait for rows, blocks or their delta, by tenant; and who knows of the last. Plain Python."""

import bisect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ftray.engine.sequence import Sequence

_MAX_PASSED = 1000
"""Waiting answers looked at in one step whose deltas are not there yet."""


class Gate(Protocol):
    """What must be in place for a sequence besides rows and blocks: its delta."""

    def enter(self, seq: Sequence) -> bool:
        """The sequence is about to run: set its `slot` and `group`; False if it cannot yet."""
        ...

    def leave(self, seq: Sequence) -> None:
        """A sequence that entered runs no more."""
        ...


class Open:
    """A gate that lets everything in."""

    def enter(self, seq: Sequence) -> bool:
        """Yes."""
        return True

    def leave(self, seq: Sequence) -> None:
        """Nothing was held."""


class Queues:
    """One queue for each tenant, in its own order."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._queues.values()))

    def add(self, seq: Sequence) -> None:
        """One waits from now on."""
        bisect.insort(self._queues.setdefault(seq.request.tenant, []), seq, key=lambda other: other.order)

    def remove(self, seq: Sequence) -> None:
        """One waits no more."""
        queue = self._queues[seq.request.tenant]
        queue.remove(seq)
        if not queue:
            del self._queues[seq.request.tenant]

    def heads(self) -> list[Sequence]:
        """The next of every tenant."""
        return [queue[0] for queue in self._queues.values()]

    def candidates(self, claim: Callable[[Sequence], Any]) -> Iterator[Sequence]:
        """Each time the next of the tenant with the smallest claim; those that were passed do not return."""
        places = dict.fromkeys(self._queues, 0)
        for _ in range(_MAX_PASSED):
            heads = [
                queue[places[tenant]] for tenant, queue in self._queues.items() if places[tenant] < len(queue)
            ]
            if not heads:
                return
            seq = min(heads, key=claim)
            yield seq
            if seq.row < 0:
                places[seq.request.tenant] += 1
