"""The searches that `benchmarks.chaos_tune` disturbs, and the steps each has done."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import recorded
from ftray.testing.tiny import tiny_base
from ftray.testing.toy_train import RECIPE
from ftray.train.transaction import MANIFEST

MEMBERS, SEGMENTS = 4, 4
SLOTS = 2

_COMMON = {
    "num_members": MEMBERS,
    "num_segments": SEGMENTS,
    "max_concurrent": SLOTS,
    "max_failures": 3,
    "stall_s": 60.0,
}
_SAVE_STEPS = 4


@dataclass(frozen=True)
class Arm:
    """One kind of search."""

    name: str
    steps: int
    """Of one segment."""
    repeatable_per_kill: int
    """Steps that one kill may have done again: of everything it may end, those since the last checkpoint."""
    delay_s: float
    """A kill comes up to so long after the record of the journal it waits for."""
    state_file: str
    """What every checkpoint holds."""
    settings: dict[str, Any]
    """Of the search, but for its name and where things are."""
    recipe: Callable[[Path, Path], dict[str, Any]]
    """Of the folder of the campaign and that of the search."""
    num_steps: Callable[[Path], int]
    """Steps done so far below the folder of a search, repeated ones included."""


def _toy(shared: Path, home: Path) -> dict[str, Any]:
    del shared
    (home / "toy.json").write_text(json.dumps({"sleep_s": 0.25}))
    return {**RECIPE, "data": {"train": str(home / "toy.json")}}


def _toy_steps(home: Path) -> int:
    log = home / "toy.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _adapters(shared: Path, home: Path) -> dict[str, Any]:
    base = shared / "base"
    if not base.exists():
        tiny_base(base)
        for name, numbers in (("train", range(48)), ("validation", range(48, 56))):
            rows = [
                {"prompt": f"question {n}\n# Answer:", "completion": " " + "abcd"[n % 4] * 3} for n in numbers
            ]
            (shared / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "member",
        "model": {"model_name_or_path": str(base)},
        "data": {
            "train": str(shared / "train.jsonl"),
            "validation": str(shared / "validation.jsonl"),
            "max_length": 64,
            "cache_dir": str(shared / "cache"),
        },
        "adapt": {"type": "lora", "r": 4},
        "objective": {"type": "benchmarks.recorded:Objective", "pause_s": 0.2},
        "optim": {"type": "benchmarks.recorded:Optimizer", "path": str(home / "steps")},
        "lr_scheduler": "constant",
        "strategy": "single",
        "train": {
            "max_steps": 1,
            "global_batch_size": 2,
            "per_device_train_batch_size": 2,
            "save_steps": _SAVE_STEPS,
            "bf16": False,
        },
    }


TRIALS = Arm(
    name="trials",
    steps=5,
    repeatable_per_kill=SLOTS * 5,
    delay_s=0.4,
    state_file="state.json",
    settings=_COMMON
    | {
        "space": {"optim.learning_rate": {"loguniform": [1e-3, 0.3]}, "adapt.r": {"choice": [2, 4, 8]}},
        "segment_steps": 5,
        "train_fn": "ftray.testing.toy_train:train",
    },
    recipe=_toy,
    num_steps=_toy_steps,
)
"""A trial for each member: a toy of a quarter of a second a step, with a checkpoint at the end of a segment."""

POPULATIONS = Arm(
    name="populations",
    steps=12,
    repeatable_per_kill=MEMBERS * _SAVE_STEPS,
    delay_s=4.0,
    state_file=MANIFEST,
    settings=_COMMON
    | {
        "space": {"optim.learning_rate": {"loguniform": [1e-3, 3e-2]}, "adapt.r": {"choice": [2, 4, 8]}},
        "segment_steps": 12,
        # One micro batch in a pass: then members are bit for bit what they are in whatever company.
        "executor": {"type": "population", "num_populations": 2, "rows_per_pass": 2},
    },
    recipe=_adapters,
    num_steps=lambda home: len(recorded.read(home / "steps")),
)
"""Two populations of two adapters over a tiny model, with a checkpoint every few steps; each exploits the other."""

ARMS = (TRIALS, POPULATIONS)
