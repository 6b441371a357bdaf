"""Slices of a campaign: each starts an endpoint, disturbs it in one way or another, and ends it.

`kills`: replicas and the control are killed, deltas promoted, rolled back and damaged, keys rotated. `crowds`:
overload, a flood, hundreds that leave. `soak`: as `kills` without the kills, with an eye on what is held.
"""

import collections
import os
import platform
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import chaos_log
from benchmarks.chaos_serve.clients import Clients
from benchmarks.chaos_serve.crowd import LEVELS, Crowd
from benchmarks.chaos_serve.endpoint import Endpoint
from benchmarks.chaos_serve.judge import MOST, Counts, Judge
from benchmarks.chaos_serve.versions import Versions
from benchmarks.chaos_serve.watch import Watch

KINDS = ("kills", "crowds", "soak")
RECOVERY_S = 15.0
"""Within this time of a kill the endpoint is whole again, and somebody was answered all the while."""
_LEAST_GOODPUT = 0.9
"""Of the most that is answered at any load, beyond capacity."""
_MOST_BESIDE_FLOOD = 1.5
"""Most that a flood may put into a victim's p95 time to the first token, as a multiple of that beside one other."""
_CLIENTS = 6
_KILLS = ("kill_engine", "kill_control")
_CHANGES = ("publish", "publish_bad", "rollback", "rotate", "upload_hostile")


@dataclass
class Slice:
    """What became of one endpoint."""

    kind: str
    wall_s: float = 0.0
    counts: dict[str, Any] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    """Of crowds and of what is held."""
    broken: list[str] = field(default_factory=list)
    """Promises that were not kept, in words."""
    notes: list[str] = field(default_factory=list)


def run_slice(folder: Path, kind: str, seed: int, minutes: float) -> Slice:
    """Disturb an endpoint of its own.

    Args:
        folder: where it lies; removed at the end.
        kind: one of `KINDS`.
        seed: decides what happens when.
        minutes: how long `kills` and `soak` go on; crowds take the time they take.
    """
    began, found = time.monotonic(), Slice(kind)
    versions = Versions(folder)
    judge = Judge(versions.said)
    endpoint = Endpoint(versions, folder, judge, seed)
    try:
        with endpoint.running():
            _KINDS[kind](endpoint, random.Random(seed), minutes * 60, found)
            endpoint.wait_free()
    except (TimeoutError, httpx.HTTPError, AssertionError) as problem:
        found.broken.append(f"{type(problem).__name__}: {problem}")
    shutil.rmtree(folder, ignore_errors=True)
    counts = judge.counts
    if judge.wrong():
        found.broken.append(f"{judge.wrong()} times what must never happen")
    if kind != "kills" and counts.streams_ended_with_error:
        found.broken.append(
            f"{counts.streams_ended_with_error} streams ended with an error and nobody was killed"
        )
    for name in ("slowest_recovery_alone_s", "longest_silence_s"):
        if (spent := getattr(counts, name)) > RECOVERY_S:
            found.broken.append(f"{name}: {spent:g}, {RECOVERY_S:g} are allowed")
    found.counts, found.events, found.notes = asdict(counts), dict(judge.events), judge.notes
    found.wall_s = round(time.monotonic() - began, 1)
    return found


def _kills(endpoint: Endpoint, draw: random.Random, seconds: float, found: Slice) -> None:
    clients = Clients(endpoint.url, endpoint.keys, endpoint.judge, _CLIENTS)
    with clients.asking():
        _disturb(endpoint, (*_KILLS, *_CHANGES, *_KILLS), draw, seconds)


def _crowds(endpoint: Endpoint, draw: random.Random, seconds: float, found: Slice) -> None:
    crowd = Crowd(endpoint, draw.randrange(2**30))
    for play in (crowd.overload, crowd.leave, crowd.flood, crowd.leave):
        found.figures |= play()
        endpoint.judge.events[play.__name__] += 1
    goodput = found.figures["goodput_per_s"]
    worst = min(goodput[f"{times}x"] for times in LEVELS if times > 1) / max(goodput.values())
    fair, flooded = found.figures["victim_p95_s"]
    found.figures |= {
        "goodput_beyond_capacity": round(worst, 3),
        "victim_p95_ratio": round(flooded / fair, 2),
    }
    if worst < _LEAST_GOODPUT:
        found.broken.append(f"overload leaves {worst:.2f} of the most that is answered")
    if flooded > _MOST_BESIDE_FLOOD * fair:
        found.broken.append(f"victim_p95_ratio: {flooded / fair:.2f}, {_MOST_BESIDE_FLOOD:g} are allowed")


def _soak(endpoint: Endpoint, draw: random.Random, seconds: float, found: Slice) -> None:
    clients = Clients(endpoint.url, endpoint.keys, endpoint.judge, _CLIENTS)
    watch = Watch(endpoint.num_series)
    with clients.asking(), watch.watching():
        _disturb(endpoint, _CHANGES, draw, seconds)
    found.figures["grown"] = watch.grown()
    found.broken += watch.leaks()


_KINDS: dict[str, Callable[[Endpoint, random.Random, float, Slice], None]] = {
    "kills": _kills,
    "crowds": _crowds,
    "soak": _soak,
}


def _disturb(endpoint: Endpoint, events: tuple[str, ...], draw: random.Random, seconds: float) -> None:
    """Every event in turn, each round in an order of its own, until the time is over."""
    until = time.monotonic() + seconds
    while True:
        for event in draw.sample(events, len(events)):
            if time.monotonic() > until:
                return
            if event.startswith("kill_"):
                endpoint.kill(event.removeprefix("kill_"))
            else:
                getattr(endpoint, event)()
            endpoint.judge.events[event] += 1
            time.sleep(draw.uniform(0.2, 1.5))


def campaign(
    folder: Path, minutes: float, seed: int, quiet: bool, slice_minutes: float = 4.0
) -> dict[str, Any]:
    """Disturb endpoints for some minutes, going on where the folder's campaign stands; returns all counts."""

    def disturbed(number: int) -> Slice:
        at = folder / f"slice-{number}"
        shutil.rmtree(at, ignore_errors=True)
        return run_slice(at, KINDS[number % len(KINDS)], seed + number, min(minutes, slice_minutes))

    slices, spent, problem = chaos_log.go_on(folder, minutes, Slice, lambda: None, disturbed, quiet)
    return summary(slices, spent, seed) | {"error": problem}


def summary(slices: list[Slice], minutes: float, seed: int) -> dict[str, Any]:
    """What is printed last."""
    counts = asdict(Counts())
    events: collections.Counter[str] = collections.Counter()
    for found in slices:
        events.update(found.events)
        for name, value in found.counts.items():
            counts[name] = max(counts[name], value) if name in MOST else counts[name] + value
    return {
        "benchmark": "chaos-serve",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "minutes": minutes,
        "seed": seed,
        "slices": dict(collections.Counter(found.kind for found in slices)),
        **counts,
        "events": dict(events),
        "kills": sum(events[kill] for kill in _KILLS),
        "figures": [{"kind": found.kind, **found.figures} for found in slices if found.figures],
        "promises_broken": sum(len(found.broken) for found in slices),
        "broken": [f"{found.kind}: {words}" for found in slices for words in found.broken],
        "notes": [note for found in slices for note in found.notes][:20],
    }
