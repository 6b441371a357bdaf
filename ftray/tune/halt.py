"""Ends a search that a signal asks to end: what trains saves where it stands first, if it does soon."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import FrameType

from ftray.core.errors import RunStopped
from ftray.train.stop import FILE, SIGNALS
from ftray.tune.segment import Job

_WAIT_S = 20.0


class Halt:
    """A request to end.

    Args:
        job: whose segments are asked in turn, by the file `stop` in their folders.
        clock: seconds, for tests.
    """

    def __init__(self, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._job, self._clock, self._since = job, clock, 0.0
        self.asked: RunStopped | None = None
        """What to raise in the end; None: nobody has asked."""

    def due(self, running: Collection[str]) -> bool:
        """Whether the search may end now: nothing runs, or it has had its time; asks what runs to end.

        Args:
            running: names of the segments that have been started and have not ended.
        """
        if self.asked is None:
            return False
        # Each time, since a segment that only now begins takes the file for an older one.
        for folder in map(self._job.path, running):
            if folder.is_dir():
                (folder / FILE).touch()
        return not running or self._clock() - self._since > _WAIT_S

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Inside the block signals ask, a second one ends at once; raised amid Ray's calls one would abort them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self.asked is not None:
            raise KeyboardInterrupt
        self._since = self._clock()
        told = f"{self._job.folder}: stopped ({signal.Signals(signum).name}); `--resume` goes on"
        self.asked = RunStopped(told, signum)
