"""What the processes of an endpoint hold over time: memory, files, threads, metric series, shared objects."""

import contextlib
import re
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import psutil
import ray

from benchmarks.chaos_serve.endpoint import processes

MAX_MIB_PER_MINUTE = 1.0
"""Most memory a process may gain once it is warm."""
_MAX_MORE = {"fds": 4, "threads": 2, "series": 0, "objects": 4}
"""How many more of each there may be in the last third than in the one before."""
_EVERY_S = 2.0
_MIB = 2**20
_KINDS = ("engine", "http", "control")


@dataclass
class Watch:
    """Samples of an endpoint.

    Args:
        num_series: asks the endpoint how many metric series it has.
    """

    num_series: Callable[[], int]
    samples: dict[tuple[str, str], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """`(process, measure)`: moments in minutes, and values."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take samples for the length of a block."""
        stop = threading.Event()
        began = time.monotonic()

        def watch() -> None:
            while not stop.wait(_EVERY_S):
                self._sample((time.monotonic() - began) / 60)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _sample(self, minute: float) -> None:
        for kind in _KINDS:
            for process in processes(kind):
                with contextlib.suppress(psutil.Error):
                    name = f"{kind}-{process.pid}"
                    with process.oneshot():
                        self._note(name, "mib", minute, process.memory_full_info().pss / _MIB)
                        self._note(name, "fds", minute, process.num_fds())
                        self._note(name, "threads", minute, process.num_threads())
        with contextlib.suppress(httpx.HTTPError):
            self._note("http", "series", minute, self.num_series())
        self._note("store", "objects", minute, _num_objects())

    def _note(self, name: str, measure: str, minute: float, value: float) -> None:
        self.samples[name, measure].append((minute, value))

    def grown(self) -> dict[str, float]:
        """What each measure gained after a third of the time: MiB a minute, or a number; of the worst process."""
        found: dict[str, float] = defaultdict(lambda: float("-inf"))
        for (name, measure), samples in self.samples.items():
            kind = name.partition("-")[0]
            warm = samples[len(samples) // 3 :]
            if len(warm) < 4:
                continue
            half = len(warm) // 2
            if measure == "mib":
                gained = statistics.linear_regression(*zip(*warm, strict=True)).slope
            else:
                middle, last = ([value for _, value in part] for part in (warm[:half], warm[half:]))
                gained = statistics.median(last) - statistics.median(middle)
            key = f"{kind}_mib_per_minute" if measure == "mib" else f"{kind}_{measure}"
            found[key] = max(found[key], round(gained, 3))
        return dict(found)

    def leaks(self) -> list[str]:
        """What grew more than it may, in words; nothing seen is no good news."""
        grown = self.grown()
        found = [f"{kind}: too little was seen" for kind in _KINDS if f"{kind}_mib_per_minute" not in grown]
        for key, gained in grown.items():
            limit = MAX_MIB_PER_MINUTE if key.endswith("minute") else _MAX_MORE[key.partition("_")[2]]
            if gained > limit:
                found.append(f"{key}: {gained:g}, at most {limit:g} is allowed")
        return found


def _num_objects() -> int:
    """Objects in Ray's shared memory."""
    from ray._private.internal_api import memory_summary

    address = ray.get_runtime_context().gcs_address  # there may be other clusters
    found = re.search(r"Plasma memory usage .*?(\d+) objects", memory_summary(address, stats_only=True))
    assert found, "Ray says it in other words now"
    return int(found[1])
