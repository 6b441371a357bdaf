"""CPU seconds and memory of this process and everything it started."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


def cpu_seconds() -> float:
    """User and system seconds so far of this process, its descendants, and their children that have ended."""
    total = 0.0
    for process in _tree():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def pss_bytes() -> int:
    """Proportional set size of the whole tree: shared pages (the object store among them) count once."""
    total = 0
    for process in _tree():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


@dataclass
class Cost:
    """What a block of work took."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_pss_bytes: int = 0


@contextlib.contextmanager
def cost(sample_s: float | None = None) -> Iterator[Cost]:
    """Measure a block; with `sample_s` also the peak of the tree's PSS, looked at that often."""
    found, done = Cost(), threading.Event()

    def watch() -> None:
        while not done.wait(sample_s):
            found.peak_pss_bytes = max(found.peak_pss_bytes, pss_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    if sample_s:
        thread.start()
    start, before = time.perf_counter(), cpu_seconds()
    try:
        yield found
    finally:
        found.wall_s, found.cpu_s = time.perf_counter() - start, cpu_seconds() - before
        done.set()
        if sample_s:
            thread.join()


def _tree() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]
