"""Waiting for room in a cluster, bounded and with a word on what is waited for."""

import sys
import time
from collections.abc import Callable, Mapping

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from ftray.core.errors import ClusterError

_SILENT_S = 5.0
_AGAIN_S = 60.0
_LOOK_S = 1.0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def wait_for_room(
    number: int,
    resources: Mapping[str, float],
    wait_s: float,
    tell: Callable[[str], None] = _tell,
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Return when a cluster has room for so many workers at once; one that scales by itself is asked for it.

    Args:
        number: workers.
        resources: of each, as `{"CPU": 2.0}`.
        wait_s: seconds after which it is given up.
        tell: hears after five seconds, and each minute, what is waited for.
        until: asked each second; true ends the wait.

    Raises:
        ClusterError: if there is no room in that time.
    """
    group = placement_group([dict(resources)] * number)
    give_up = time.monotonic() + wait_s
    tell_at = time.monotonic() + _SILENT_S
    try:
        while not group.wait(max(0.0, min(_LOOK_S, give_up - time.monotonic()))) and not until():
            if time.monotonic() < min(tell_at, give_up):
                continue
            needed = f"{number} workers of {_words(resources)} each; the cluster has {_has(resources)}"
            if time.monotonic() >= give_up:
                raise ClusterError(
                    f"no room in {wait_s:g} s for {needed}; ask for fewer or smaller workers "
                    "(`strategy.num_workers`, `strategy.cpus_per_worker`), add nodes, or wait longer "
                    "(`strategy.wait_for_room_s`); a run that had begun goes on with --resume"
                )
            tell(f"waiting for room for {needed}")
            tell_at = time.monotonic() + _AGAIN_S
    finally:
        remove_placement_group(group)


def _words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _has(resources: Mapping[str, float]) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    return " and ".join(
        f"{total.get(name, 0.0):g} {name}, {free.get(name, 0.0):g} of them free" for name in resources
    )
