"""Rows that cannot be used: kept on disk while there may be many, and counted so that a hopeless job ends early."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ftray.data.work import Outcome

FIRST_ROWS = 5000
"""So many rows at the begin of a corpus are judged by themselves."""
_ROWS = 1000
_MARGIN = 4.0
"""How many rows there will be is told from the bytes of those read so far, and that many times more allowed for."""


class Records:
    """The records of all units on this process's disk, so that no number of bad rows fills its memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ftray-quarantine-")  # noqa: SIM115
        self._places: dict[int, tuple[int, int]] = {}

    def take(self, outcome: Outcome) -> Outcome:
        """Move a unit's records to the disk; its counts stay with it. A later pass over the unit replaces them."""
        begin = self._file.seek(0, 2)
        content = json.dumps(outcome.quarantined, ensure_ascii=False).encode() if outcome.quarantined else b""
        self._file.write(content)
        self._places[outcome.unit.index] = (begin, len(content))
        outcome.quarantined = []
        return outcome

    def lines(self, outcomes: Sequence[Outcome]) -> Iterator[str]:
        """JSON of the records of units in their order, with line numbers within the file, from 1."""
        before: Counter[str] = Counter()
        for outcome in outcomes:
            first = before[outcome.unit.file] + 1
            for record in sorted(self._of(outcome), key=lambda record: record["offset"]):
                yield json.dumps({**record, "line": record["line"] + first}, ensure_ascii=False) + "\n"
            before[outcome.unit.file] += outcome.lines

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    def _of(self, outcome: Outcome) -> list[dict[str, Any]]:
        begin, size = self._places[outcome.unit.index]
        if not size:
            return []
        self._file.seek(begin)
        found: list[dict[str, Any]] = json.loads(self._file.read(size))
        return found


class QuarantineLimit:
    """Tells when there are too many rows in quarantine to go on.

    That is so if more than the limit are among the first `FIRST_ROWS` rows, or if they will be too many although
    all that follow are good. Units are judged in their order, in whatever order they are prepared.

    Args:
        max_quarantine: share of all rows that may be in quarantine.
        total_bytes: of the sources.
    """

    def __init__(self, max_quarantine: float, total_bytes: int) -> None:
        self._allowed, self._total_bytes, self._bytes = max_quarantine, total_bytes, 0
        self._waiting: dict[int, tuple[int, int, Counter[str]]] = {}
        self.units = 0
        """Units judged so far: those before this one."""
        self.rows = 0
        """Rows of them."""
        self.quarantined: Counter[str] = Counter()
        """Those that cannot be used, by reason."""

    def passed(self, outcome: Outcome) -> bool:
        """Take a unit, each once; True if there is no hope any more."""
        size = outcome.unit.stop - outcome.unit.start
        self._waiting[outcome.unit.index] = (outcome.rows, size, outcome.bad)
        while (found := self._waiting.pop(self.units, None)) is not None:
            before = self.rows
            self.units, self.rows, self._bytes = self.units + 1, self.rows + found[0], self._bytes + found[1]
            self.quarantined.update(found[2])
            if self._is_hopeless(before):
                return True
        return False

    def _is_hopeless(self, before: int) -> bool:
        bad = self.quarantined.total()
        if before < FIRST_ROWS <= self.rows and bad > self._allowed * self.rows:
            return True
        expected = _MARGIN * self.rows * self._total_bytes / max(1, self._bytes)
        return self.rows >= _ROWS and bad > self._allowed * expected
