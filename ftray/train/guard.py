"""The guard of one training process: a process of its own, so that no hang of the other can stop it.

`ftray.train.watchdog` starts this file as a script of the standard library alone (`python -I -S`). It reads what
the training process does next, and for how long it may, from its standard input; when that time is over it has
the stacks of all threads written, gives the process a chance to say what happened, and ends it. A process that
sleeps, one that holds the interpreter's lock and one that is stopped are found alike.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

POLL_S = 0.2
STACKS_WAIT_S = 2.0
GRACE_S = 3.0
"""Between the stacks and the end: time for the other ranks' stacks, and for the process to end by itself."""


class Guard:
    """Watches the parent process.

    Args:
        pid: the parent.
        rank: its rank.
        stacks: the file its stacks go to; the folder is shared by all ranks of the run.
    """

    def __init__(self, pid: int, rank: int, stacks: Path) -> None:
        self.pid, self.rank, self.stacks = pid, rank, stacks
        self.doing, self.allowed_s = "start", None
        self.silent_s, self.started, self.dumped = 0.0, time.time(), False

    def run(self) -> None:
        """Watch until the parent closes the pipe or is ended."""
        before = time.monotonic()
        while True:
            time.sleep(POLL_S)  # what was said meanwhile waits in the pipe
            now = time.monotonic()
            # What was suspended together with this process was not silent.
            self.silent_s += min(now - before, 3 * POLL_S)
            before = now
            if select.select([0], [], [], 0)[0]:
                data = os.read(0, 1 << 20)
                if not data:
                    return
                self._hear(data)
            if self.allowed_s is not None and self.silent_s > self.allowed_s:
                self._end()
                return
            if not self.dumped and self._another_hangs():
                self._dump()

    def _hear(self, data: bytes) -> None:
        with contextlib.suppress(ValueError):
            message = json.loads(data.splitlines()[-1])
            self.doing, self.allowed_s = message["doing"], message["allowed_s"]
        self.silent_s = 0.0

    def _another_hangs(self) -> bool:
        reports = self.stacks.parent.glob("hung-*.json")
        with contextlib.suppress(OSError):
            return any(report.stat().st_mtime > self.started for report in reports)
        return False

    def _end(self) -> None:
        what = (
            f"rank {self.rank} made no progress in {self.doing} for {self.silent_s:.0f} s "
            f"(allowed: {self.allowed_s:g} s)"
        )
        report = {"rank": self.rank, "pid": self.pid, "what": what, "time": time.time()}
        with contextlib.suppress(OSError):
            tmp = self.stacks.with_suffix(".tmp")
            tmp.write_text(json.dumps(report))
            tmp.replace(self.stacks.parent / f"hung-{self.rank}.json")
        self._dump()
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            if select.select([0], [], [], POLL_S)[0] and not os.read(0, 1 << 20):
                return  # it ended by itself
        print(f"error: {what}; stacks: {self.stacks}", file=sys.stderr, flush=True)
        self._signal(signal.SIGKILL)

    def _dump(self) -> None:
        """Have the stacks written; a stopped process is continued for it."""
        self.dumped = True
        before = self._size()
        self._signal(signal.SIGUSR2)
        self._signal(signal.SIGCONT)
        deadline = time.monotonic() + STACKS_WAIT_S
        while self._size() == before and time.monotonic() < deadline:
            time.sleep(0.05)

    def _size(self) -> int:
        try:
            return self.stacks.stat().st_size
        except OSError:
            return -1

    def _signal(self, number: signal.Signals) -> None:
        if os.getppid() == self.pid:  # never another process that got the same number
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # it ends with its parent
    Guard(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])).run()
