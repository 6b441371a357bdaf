"""AdamW that times each step and waits before the next: so runs take turns in processes that nobody can talk to."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftray.core.spec import spec
from ftray.optim.adamw import AdamW

_POLL_S = 0.02
_PATIENCE_S = 300.0


class _Clock:
    """Behind every optimiser step: notes what the step took, then waits until there is a turn for the next."""

    def __init__(self, path: Path) -> None:
        self._path, self._steps, self._begun = path, 0, (0.0, 0.0)

    def __call__(self, *_: Any) -> None:
        cpu_s, wall_s = time.process_time() - self._begun[0], time.perf_counter() - self._begun[1]
        with self._path.open("a") as file:
            file.write(json.dumps({"cpu_s": cpu_s, "wall_s": wall_s}) + "\n")
        self._steps += 1
        _wait_for(_turns(self._path), self._steps)
        self._begun = time.process_time(), time.perf_counter()


@spec
class TimedAdamW(AdamW):
    """AdamW that appends to a file the seconds of each step, from one optimiser step to the next.

    The first line is of the first step and says nothing. A line in `<path>.turns` lets one more step begin.
    """

    path: str = ""

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        """As AdamW, with the clock behind each step."""
        built = super().build(parameters)
        built[0].register_step_post_hook(_Clock(Path(self.path)))
        return built


def begin(path: Path) -> None:
    """Wait until a run has done its first step."""
    _wait_for(path, 1)


def take_turns(paths: Sequence[Path], steps: int) -> list[list[dict[str, float]]]:
    """Let runs of `steps + 1` steps take all but the first in turn; gives what each step of each took."""
    for step in range(1, steps + 1):
        for path in paths:
            _give_turn(path)
            _wait_for(path, step + 1)
    for path in paths:
        _give_turn(path)
    return [[json.loads(line) for line in path.read_text().splitlines()[1:]] for path in paths]


def _turns(path: Path) -> Path:
    return path.with_name(path.name + ".turns")


def _give_turn(path: Path) -> None:
    with _turns(path).open("a") as file:
        file.write("\n")


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _wait_for(path: Path, lines: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while _count(path) < lines:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path}: no line {lines} in {_PATIENCE_S:g} s; see the arms' log")
        time.sleep(_POLL_S)
