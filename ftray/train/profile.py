"""Torch traces of a few steps on every rank, and what they say: the slowest rank, the costliest operation.

run_dir/profile/rank-0.trace.json.gz   for chrome://tracing or ui.perfetto.dev
run_dir/profile/rank-0.json            seconds a step, busy and waiting; operations by own time
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ftray.core.fs import read_json, write_json

FOLDER = "profile"
_WAIT = 2
_COLLECTIVE = ("gloo:", "nccl:", "nccldevkernel", "c10d::")
_KINDS = ("allreduce", "allgather", "reducescatter", "broadcast", "alltoall", "barrier")
_NUM_OPS = 15


class Profiler:
    """Traces the steps after the first two.

    Args:
        run_dir: the run's folder.
        num_steps: steps to trace; None: none, and every call does nothing.
        rank: this process's.
    """

    def __init__(self, run_dir: Path, num_steps: int | None, rank: int) -> None:
        self._folder, self._rank, self._num_steps = run_dir / FOLDER, rank, num_steps
        self._profile: Any = None
        self._step, self._start = 0, 0.0

    def step(self) -> None:
        """Call after each optimiser step."""
        if self._num_steps is None:
            return
        self._step += 1
        if self._step == _WAIT:
            self._begin()
        elif self._profile is not None and self._step == _WAIT + self._num_steps:
            self.close()

    def _begin(self) -> None:
        if (
            self._rank == 0
        ):  # traces of an earlier life, maybe of more ranks; no rank writes before the next step
            for path in self._folder.glob("rank-*"):
                path.unlink(missing_ok=True)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._start = time.perf_counter()

    def close(self) -> None:
        """Write what there is; a run may end before all steps are traced."""
        if self._profile is None:
            return
        seconds, found, steps = time.perf_counter() - self._start, self._profile, self._step - _WAIT
        self._profile = None
        found.stop()
        if not steps:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._folder / f"rank-{self._rank}.trace.json.gz"))
        write_json(self._folder / f"rank-{self._rank}.json", summary_of(found, seconds, steps, self._rank))


def summary_of(found: Any, seconds: float, steps: int, rank: int) -> dict[str, Any]:
    """One rank's steps: seconds, those it waited for other ranks, and operations by own time."""
    averages = found.key_averages()
    on_gpu = any(item.self_device_time_total for item in averages)
    ops, waits = {}, list[tuple[str, float]]()
    for item in averages:
        own_us = item.self_device_time_total if on_gpu else item.self_cpu_time_total
        if item.key.lower().startswith(_COLLECTIVE):
            waits.append((item.key, item.device_time_total if on_gpu else item.cpu_time_total))
        elif own_us and not item.is_user_annotation:  # a stretch of a step is no operation
            ops[item.key] = own_us / 1e6
    top = dict(sorted(ops.items(), key=lambda pair: -pair[1])[:_NUM_OPS])
    waited_s = min(seconds, waited_us(waits) / 1e6)
    return {
        "rank": rank,
        "steps": steps,
        "step_s": seconds / steps,
        "busy_s": (seconds - waited_s) / steps,
        "waited_s": waited_s / steps,
        "ops_s": {name: own_s / steps for name, own_s in top.items()},
        "all_ops_s": sum(ops.values()) / steps,
    }


def waited_us(collectives: Iterable[tuple[str, float]]) -> float:
    """Time in collectives, from (name, time of all its calls).

    One call is recorded by the library that makes it and by the one that carries it (`c10d::allreduce_` and
    `gloo:all_reduce`), so of these the longest counts; gathers, scatters and sums follow each other and add up.
    """
    found: dict[str, dict[str, float]] = {}
    for name, time_us in collectives:
        layer = next(prefix for prefix in _COLLECTIVE if name.lower().startswith(prefix))
        bare = name.lower().removeprefix(layer).replace("_", "")
        kind = next((kind for kind in _KINDS if kind in bare), bare)
        layers = found.setdefault(kind, {})
        layers[layer] = layers.get(layer, 0.0) + time_us
    return sum(max(layers.values()) for layers in found.values())


def summarise(run_dir: Path) -> list[str]:
    """The traces of a run in words: the slowest rank, and the operation that takes most there."""
    ranks = [read_json(path) for path in sorted((run_dir / FOLDER).glob("rank-*.json"))]
    if not ranks:
        return ["profile: the run ended before a step was traced; train at least 3"]
    lines = [
        f"profile: rank {r['rank']}: {r['step_s'] * 1e3:.1f} ms a step, {r['busy_s'] * 1e3:.1f} busy, "
        f"{r['waited_s'] * 1e3:.1f} with other ranks"
        for r in ranks
    ]
    # Ranks end a step together: the slowest is the one the others wait for.
    slowest = max(ranks, key=lambda rank: rank["busy_s"])
    name, own_s = next(iter(slowest["ops_s"].items()), ("nothing", 0.0))
    share = own_s / max(slowest["all_ops_s"], 1e-12)
    lines.append(
        f"profile: slowest is rank {slowest['rank']}; most of its time is in {name} ({share:.0%}, "
        f"{own_s * 1e3:.1f} ms a step); traces in {run_dir / FOLDER}"
    )
    return lines
