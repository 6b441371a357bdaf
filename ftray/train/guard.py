"""The guard of one training process: a process of its own, so that no hang of the other can stop it.

`ftray.train.watchdog` starts this file as a script of the standard library alone (`python -I -S`). It reads what
the training process does next, and for how long it may, from its standard input; when that time is over it has
the stacks of all threads written, gives the process a chance to say what happened, and ends it. A process that
sleeps, one that holds the interpreter's lock and one that is stopped are found alike.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

POLL_S = 0.2
STACKS_WAIT_S = 1.0
"""Until a handler has begun to write."""
GRACE_S = 3.0
"""Between the stacks and the end: time for the other ranks' stacks, and for the process to end by itself."""
ALL_STACKS = signal.SIGUSR2
"""Has the stacks of all threads written: of the newest hundred, as CPython bounds it."""
ONE_STACK = signal.SIGRTMIN + 5
"""Has the stack of the thread that gets it written."""


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
        self.thread = pid
        """System's number of the thread that trains; that of the main thread is the process's."""
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
            self.doing, self.allowed_s, self.thread = (message[k] for k in ("doing", "allowed_s", "thread"))
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
        """Have the stacks written, and again those that must not be missing; a stopped process is continued."""
        self.dumped = True
        self._wait_for_stacks(ALL_STACKS)
        for what, thread in {"main thread": self.pid, "thread that trains": self.thread}.items():
            with contextlib.suppress(OSError), self.stacks.open("a") as file:
                file.write(f"\n{what} ({thread}): ")
            self._wait_for_stacks(ONE_STACK, thread)

    def _wait_for_stacks(self, number: int, thread: int | None = None) -> None:
        """Ask for stacks; until they are written, for two handlers would write into each other's lines."""
        before = size = self._size()
        self._signal(number, thread)
        self._signal(signal.SIGCONT)
        deadline = time.monotonic() + STACKS_WAIT_S
        while time.monotonic() < deadline and os.getppid() == self.pid:
            time.sleep(0.05)
            size, last = self._size(), size
            if size == last != before:
                return

    def _size(self) -> int:
        try:
            return self.stacks.stat().st_size
        except OSError:
            return -1

    def _signal(self, number: int, thread: int | None = None) -> None:
        """Send a signal to the parent, or to one thread of it."""
        if os.getppid() == self.pid:  # never another process that got the same number
            with contextlib.suppress(ProcessLookupError, AttributeError):  # a C library without `tgkill`
                if thread is None:
                    os.kill(self.pid, number)
                else:
                    ctypes.CDLL(None).tgkill(self.pid, thread, number)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # it ends with its parent
    Guard(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])).run()
