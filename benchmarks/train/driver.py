"""Arms as processes that take one step each in turn."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Record = dict[str, Any]


class Arm:
    """A process of `benchmarks.train.arm`."""

    def __init__(self, spec: Mapping[str, Any], log: Any) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "PYTHONUNBUFFERED": "1"}
        environment |= spec.get("environment", {})
        self.name = str(spec["name"])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train.arm", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )

    def go(self) -> None:
        """Let it take a step."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def answer(self) -> Record:
        """What it says next. Raises RuntimeError if it ended instead."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"arm {self.name} ended with {self._process.wait()}; see its log")
        return dict(json.loads(line))

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=60)


@contextlib.contextmanager
def arms(specs: Sequence[Mapping[str, Any]], log_path: Any) -> Iterator[list[Arm]]:
    """Start arms, each when the one before has imported what it needs."""
    started: list[Arm] = []
    with open(log_path, "a") as log:  # noqa: PTH123 (a path or a descriptor)
        try:
            for spec in specs:
                started.append(Arm(spec, log))
                started[-1].answer()
            yield started
        finally:
            for arm in started:
                arm.stop()


def interleave(specs: Sequence[Mapping[str, Any]], steps: int, log_path: Any) -> dict[str, list[Record]]:
    """Records of `steps` steps of each arm by name, in turn; arms of the same name are the ranks of one run."""
    records: dict[str, list[Record]] = {str(spec["name"]): [] for spec in specs}
    with arms(specs, log_path) as running:
        for _ in range(steps):
            for name, found in records.items():
                group = [arm for arm in running if arm.name == name]
                for arm in group:
                    arm.go()
                answers = [arm.answer() for arm in group]
                wall_s = max(answer["wall_s"] for answer in answers)
                ranks_cpu_s = sum(answer["cpu_s"] for answer in answers)
                found.append(answers[0] | {"wall_s": wall_s, "ranks_cpu_s": ranks_cpu_s})
    return records


def median(records: list[Record], key: str, warm: int = 2) -> float:
    """Median of a figure after the first `warm` steps."""
    return statistics.median(record[key] for record in records[warm:])


def ratio(ours: list[Record], theirs: list[Record], key: str, warm: int = 2) -> float:
    """How many times faster we were: the median over the pairs of steps."""
    pairs = zip(ours[warm:], theirs[warm:], strict=True)
    return statistics.median(their[key] / our[key] for our, their in pairs)
