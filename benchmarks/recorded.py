"""Pieces of a recipe that write down which rows each optimiser step was taken on, where it is taken."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.data.order import PADDING
from ftray.model.policy import Policy
from ftray.objective.lm import SupervisedFineTuning
from ftray.optim.adamw import AdamW

_ROWS: list[int] = []
"""Rows this process has computed gradients of since its last optimiser step."""


@spec
class Objective(SupervisedFineTuning):
    """Supervised fine-tuning that takes its time and remembers its rows."""

    pause_s: float = 0.0

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        if torch.is_grad_enabled():
            time.sleep(self.pause_s)
            _ROWS.extend(int(row) for row in batch.row_ids if row != PADDING)
        return super().sums(policy, batch)


@spec
class Optimizer(AdamW):
    """AdamW that appends a line to `<path>.<pid>` at each step: its own count of steps, and the rows.

    The count is part of the optimiser's state, so it comes back with a checkpoint.
    """

    path: str = ""

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        built = super().build(parameters)
        built[0].register_step_post_hook(self._write)
        return built

    def _write(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        state = next(iter(optimizer.state.values()))
        rank = dist.get_rank() if dist.is_initialized() else 0
        line = {"step": int(state["step"]), "rank": rank, "rows": list(_ROWS), "time": time.time()}
        _ROWS.clear()
        with Path(f"{self.path}.{os.getpid()}").open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Every line that any process of a run wrote, in order of time; torn ones are left out."""
    lines = []
    for file in path.parent.glob(f"{path.name}.*"):
        for line in file.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return sorted(lines, key=lambda line: line["time"])


def rows_by_step(lines: list[dict[str, Any]]) -> dict[int, list[int]]:
    """The rows of the steps that count: of each step what each rank did last, in order of ranks."""
    last: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        last[line["step"]][line["rank"]] = line
    return {
        step: [row for rank in sorted(ranks) for row in ranks[rank]["rows"]]
        for step, ranks in sorted(last.items())
    }


def lost_work(lines: list[dict[str, Any]]) -> int:
    """The most steps that were done and had to be done again, over all breaks of a run, seen on rank 0."""
    lost, newest = 0, 0
    for line in lines:
        if line["rank"] == 0:
            lost = max(lost, newest - line["step"] + 1)
            newest = line["step"]
    return lost
