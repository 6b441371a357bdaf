"""Says when a search has stopped moving, whatever the reason: no room on the cluster, a lost process, a hang."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

_LOOK_EVERY_S = 1.0
_SIGNS = (".lock", "metrics.jsonl", "progress/rank-*.json", "segment.json")


class StallWatch:
    """Looks for signs of progress: a record of the journal, or a file of a running segment that is newer.

    Args:
        segments: the folder of the segments.
        limit_s: seconds without one that are too long; None: none are.
        clock: seconds, for tests.
    """

    def __init__(
        self, segments: Path, limit_s: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._segments, self._limit_s, self._clock = segments, limit_s, clock
        self._moved = self._looked = clock()
        self._sign: tuple[float, ...] = ()

    def tell(self) -> None:
        """Something has happened."""
        self._moved = self._clock()

    def stalled(self, running: Iterable[str]) -> str | None:
        """What to tell the user if nothing has happened for too long; looked for once a second at most.

        Args:
            running: names of the segments that have been started and have not ended.
        """
        now = self._clock()
        if self._limit_s is None or now - self._looked < _LOOK_EVERY_S:
            return None
        self._looked = now
        names = sorted(running)
        sign = tuple(self._newest(self._segments / name) for name in names)
        if sign != self._sign:
            self._sign, self._moved = sign, now
        if now - self._moved < self._limit_s:
            return None
        waiting = f"{', '.join(names)} without a sign of life" if names else "nothing running"
        return (
            f"{self._segments.parent}: no progress for {self._limit_s:g} s, {waiting}; see that the cluster has "
            "`cpus_per_trial` free, raise `stall_s` if a step takes that long, and go on with --resume"
        )

    def _newest(self, folder: Path) -> float:
        times = [path.stat().st_mtime for pattern in _SIGNS for path in folder.glob(pattern)]
        return max(times, default=0.0)
