"""A stand-in for `ftray.train.worker:train` that takes milliseconds: noisy descent on w^2 from w = 4.

What it shall do beyond that stands in the JSON file the recipe names as its first training file:
`sleep_s` per step, and under `crash`, `raise`, `diverge`, `hang` beginnings of run folder names (`m002-s001`).
It keeps the promises of the real one: committed checkpoints, equal results for equal input.
"""

import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.core.fs import commit_dir, read_json, write_json

RECIPE: dict[str, Any] = {
    "name": "toy",
    "model": {"init": "config", "config": {"model_type": "llama"}},
    "adapt": "lora",
    "objective": "sft",
    "optim": "adamw",
    "lr_scheduler": "constant",
    "strategy": "single",
    "train": {"max_steps": 1},
}
"""A recipe it trains, but for its rows (`data.train`)."""


@dataclass(frozen=True)
class ToyResult:
    """The fields of a training result that a search reads."""

    run_dir: Path
    checkpoint: Path
    delta: Path
    metrics: dict[str, float]
    step: int
    tokens: int
    """Ten a step."""


def train(recipe: Any, io: Any, *, start_from: Path | None = None, stop_at: int | None = None) -> ToyResult:
    """Train a toy to the absolute step `stop_at`, from a checkpoint folder or from the beginning."""
    settings_file = Path(recipe.data.train[0])
    settings = read_json(settings_file)
    name = io.run_dir.name
    assert stop_at is not None
    final = io.run_dir / "checkpoints" / f"step-{stop_at:08}"
    state = {"w": 4.0, "step": 0} if start_from is None else read_json(start_from / "state.json")
    while state["step"] < stop_at:
        time.sleep(settings.get("sleep_s", 0.0))
        noise = random.Random(state["step"]).uniform(0.5, 1.5)
        state["w"] -= recipe.optim.learning_rate * noise * state["w"]
        state["step"] += 1
        with settings_file.with_suffix(".log").open("a") as log:
            log.write(json.dumps({"run": name, "step": state["step"], "pid": os.getpid()}) + "\n")
        _fault(settings, name)
    if any(name.startswith(start) for start in settings.get("diverge", [])):
        state["w"] = math.nan
    if not final.exists():
        with commit_dir(final) as tmp:
            write_json(tmp / "state.json", state)
    delta = io.run_dir / "delta"
    write_json(delta / "toy.json", state)
    step = int(state["step"])
    return ToyResult(io.run_dir, final, delta, {"eval_loss": state["w"] ** 2}, step, 10 * step)


def _fault(settings: dict[str, Any], name: str) -> None:
    if any(name.startswith(start) for start in settings.get("hang", [])):
        time.sleep(3600)
    if any(name.startswith(start) for start in settings.get("crash", [])):
        os._exit(1)
    if any(name.startswith(start) for start in settings.get("raise", [])):
        raise RuntimeError("told to fail")
