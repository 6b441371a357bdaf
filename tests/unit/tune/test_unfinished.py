"""A segment whose process is killed goes on from its own checkpoint."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftray.config.load import load, write_resolved
from ftray.config.recipe import Recipe
from ftray.config.tune import TRAIN_FN, TuneConfig
from ftray.core.spec import parse
from ftray.train.io import LocalIO
from ftray.train.worker import train
from ftray.tune.as_searched import segment_recipe
from ftray.tune.engine import Segment
from ftray.tune.segment import Job, run_segment
from tests.recipes import MakeRecipe

SAVE_STEPS = 2
SEGMENT = Segment("m000-s000-abc", 0, 0, 1, 0, None, {"optim.learning_rate": 0.01}, 8)


def counted(recipe: Recipe, io: LocalIO, *, start_from: Path | None, stop_at: int | None) -> Any:
    """Train, and write each step down; at step `DIE_AT` the process ends, once the checkpoint before is there."""

    def note(record: dict[str, Any]) -> None:
        if "grad_norm" not in record:
            return
        with (io.run_dir / "steps").open("a") as steps:
            steps.write(f"{record['step']}\n")
        if str(record["step"]) == os.environ.get("DIE_AT"):
            newest = io.run_dir / "checkpoints" / f"step-{record['step'] - 1:08}"
            deadline = time.monotonic() + 20
            while not newest.is_dir() and time.monotonic() < deadline:
                time.sleep(0.01)
            os._exit(9)

    return train(recipe, LocalIO(io.run_dir, on_record=note), start_from=start_from, stop_at=stop_at)


def search(folder: Path, recipe: Recipe, train_fn: str) -> Job:
    settings = {"name": "s", "recipe": "r", "num_segments": 1, "segment_steps": 8}
    config = parse(TuneConfig, {**settings, "space": {"optim.learning_rate": {"uniform": [0, 1]}}})
    return Job(str(folder), segment_recipe(config, recipe), train_fn, "eval_loss", str(Path.cwd()))


@pytest.mark.slow
def test_no_more_is_repeated_than_lies_between_checkpoints(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train__save_steps=SAVE_STEPS)
    write_resolved(recipe, tmp_path / "recipe.yaml")
    whole = run_segment(search(tmp_path / "whole", recipe, TRAIN_FN), SEGMENT)
    killed = tmp_path / "killed"
    command = [sys.executable, __file__, str(tmp_path / "recipe.yaml"), str(killed)]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "DIE_AT": "5"}
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    job = search(killed, recipe, f"{__name__}:counted")
    outcome = run_segment(job, SEGMENT)
    steps = (job.path(SEGMENT.name) / "steps").read_text().split()
    assert steps == ["1", "2", "3", "4", "5", "5", "6", "7", "8"]
    assert outcome.score == whole.score and outcome.tokens == whole.tokens


if __name__ == "__main__":
    run_segment(search(Path(sys.argv[2]), load(Recipe, sys.argv[1]), "__main__:counted"), SEGMENT)
