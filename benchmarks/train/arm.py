"""One arm of a comparison, alone in its process: `python -m benchmarks.train.arm '<spec as JSON>'`.

An arm waits for a line on its standard input, takes one optimiser step, and answers with a line of JSON: the arms
of one comparison are interleaved step by step, each with its own memory and threads. Everything that a library
prints goes to standard error.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import cpu_seconds
from benchmarks.train.setup import make_recipe
from ftray.core.spec import replace

_PEAK_S = 0.1
"""CPU seconds one product is repeated for: the clock hears of other threads some milliseconds late."""


class Lines:
    """The talk with the driver: `pause(record)` answers for a step and waits for the next."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._baseline = 0
        self._start = (0.0, 0.0)

    def ready(self) -> None:
        """Everything is imported: what is held from now on counts as memory; waits for the first step."""
        import torch._dynamo  # noqa: F401 (an optimiser imports it at its first step)

        self._baseline = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._say({"ready": True})

    def pause(self, record: dict[str, Any]) -> None:
        """Tell what the step took and wait."""
        wall_s, cpu_s = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        peak = _status("VmHWM") - self._baseline
        self._say({**record, "wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": peak})

    def _say(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the driver has seen enough
        self._start = (time.perf_counter(), time.process_time())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def ours(spec: dict[str, Any], lines: Lines) -> None:
    """The product: `ftray.train.worker.train` with its feed, trackers and checks."""
    import torch.distributed as dist

    from ftray.train.io import LocalIO
    from ftray.train.worker import train

    lines.ready()
    if "rank" in spec:
        os.environ |= {
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(spec["port"]),
        }
        dist.init_process_group("gloo", rank=spec["rank"], world_size=spec["world"])

    class Paused(LocalIO):
        """Pauses after each step, on every rank."""

        def log(self, record: dict[str, Any]) -> None:
            super().log(record)
            lines.pause(record)

    recipe, run_dir = _recipe_and_folder(spec)
    train(recipe, Paused(run_dir))


def checkpoint(spec: dict[str, Any], lines: Lines) -> None:
    """A step, then a checkpoint written beside the next, then a step and one that is waited for."""
    from ftray.train.io import LocalIO
    from ftray.train.worker import begin, one_step

    recipe, run_dir = _recipe_and_folder(spec)
    lines.ready()
    run = begin(recipe, LocalIO(run_dir), None)
    while True:
        record: dict[str, Any] = {}
        for key, wait in (("asynchronous_s", False), ("synchronous_s", True)):
            one_step(run, 0.0)
            start = time.perf_counter()
            run.commit(wait=wait)
            record[key] = time.perf_counter() - start
        newest = run.checkpoints.path(run.state.step)
        record["checkpoint_bytes"] = sum(file.stat().st_size for file in newest.iterdir())
        lines.pause(record)


def launch(spec: dict[str, Any], lines: Lines) -> None:
    """The whole of a short run, through Ray Train if its strategy says so, from the call to its result."""
    from ftray.train.ray_launch import launch as run

    recipe, run_dir = _recipe_and_folder(spec)
    lines.ready()
    recipe = replace(replace(recipe, "name", run_dir.name), "output_dir", str(run_dir.parent))
    start = time.perf_counter()
    first: list[tuple[float, float]] = []
    last: list[tuple[int, float]] = []

    def on_record(record: dict[str, Any]) -> None:
        first[:] = first or [(time.perf_counter() - start - record["elapsed_s"], cpu_seconds())]
        if "grad_norm" in record:  # and not the end of the run
            last[:] = [(record["step"], cpu_seconds())]

    run(recipe, on_record=on_record)
    (startup_s, begun_cpu_s), (steps, ended_cpu_s) = first[0], last[0]
    lines.pause({"startup_s": startup_s, "all_cpu_s_per_step": (ended_cpu_s - begun_cpu_s) / (steps - 1)})


def _recipe_and_folder(spec: dict[str, Any]) -> tuple[Any, Path]:
    """What is run, and a folder for it that goes when the set-up's folder does."""
    folder = Path(spec["folder"])
    name = spec.get("run", f"{spec['name']}-{os.getpid()}")
    return make_recipe(folder, spec["length"], **spec.get("changes", {})), folder / "runs" / name


def trl(spec: dict[str, Any], lines: Lines) -> None:
    """TRL's trainer on the same rows."""
    from benchmarks.train.trl_arm import run

    run(spec, lines)


def peak(spec: dict[str, Any], lines: Lines) -> None:
    """The machine's matrix product: one step is the best of a few square and tall shapes."""
    import torch

    lines.ready()
    dtype = getattr(torch, spec["dtype"])
    shapes = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 512, 1344), (4096, 1344, 512)]
    pairs = [(torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)) for m, k, n in shapes]
    while True:
        best = 0.0
        for left, right in pairs * 2:
            start, count, taken = time.process_time(), 0, 0.0
            while taken < _PEAK_S:
                torch.nn.functional.linear(left, right)
                count, taken = count + 1, time.process_time() - start
            best = max(best, count * 2 * left.shape[0] * left.shape[1] * right.shape[0] / taken)
        lines.pause({"flops_per_cpu_s": best})


def main() -> None:
    """Run the arm that the specification names."""
    spec = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(spec["threads"])
    arms = {"ours": ours, "trl": trl, "peak": peak, "checkpoint": checkpoint, "launch": launch}
    arms[spec["arm"]](spec, Lines())


if __name__ == "__main__":
    main()
