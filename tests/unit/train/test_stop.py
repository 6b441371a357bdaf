"""A run that is asked to end early commits every step it has done, and goes on from there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftray.config.load import write_resolved
from ftray.config.recipe import Recipe
from ftray.core.errors import RunStopped
from ftray.train.io import LocalIO
from ftray.train.ray_launch import launch
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe


def losses(folder: Path) -> dict[int, float]:
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "grad_norm" in record}


class Signals(LocalIO):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, run_dir: Path, number: signal.Signals, at: int) -> None:
        super().__init__(run_dir)
        self.number, self.at = number, at

    def beat(self, step: int, phase: str = "step") -> None:
        super().beat(step, phase)
        if step == self.at and phase == "step":
            self.at = -1
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step(
    make_recipe: MakeRecipe, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, recipe = make_recipe("whole"), make_recipe("run", train__save_steps=100)
    train(whole, LocalIO(Path(whole.output_dir) / "whole"))
    folder = Path(recipe.output_dir) / "run"
    before = signal.getsignal(number)
    with pytest.raises(RunStopped, match=rf"stopped after step 4 \({number.name}\).*`--resume`") as stopped:
        train(recipe, Signals(folder, number, 3))
    assert stopped.value.signum == number and signal.getsignal(number) == before
    assert "this step is ended and a checkpoint written" in capfd.readouterr().err
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert launch(recipe, resume=True).step == 6
    assert losses(folder) == losses(Path(whole.output_dir) / "whole"), "no step lost, none twice"


def test_a_file_asks_too(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    folder = Path(recipe.output_dir) / recipe.name

    def ask(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            (folder / "stop").write_text("maintenance")
            time.sleep(0.6)

    with pytest.raises(RunStopped, match=r"after step [23] \(maintenance\)"):
        launch(recipe, on_record=ask)
    assert launch(recipe, resume=True).step == 6


def test_the_command_ends_as_a_signal_would(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe: Recipe = make_recipe(
        train__max_steps=1000, objective={"type": "tests.slow_objective:Slow", "pause_s": 0.02}
    )
    file, folder = tmp_path / "recipe.yaml", Path(recipe.output_dir) / recipe.name
    write_resolved(recipe, file)
    process = subprocess.Popen(
        [sys.executable, "-m", "ftray.cli.main", "run", str(file)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 60
    while max(losses(folder), default=0) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "stopped: run: stopped after step" in stderr
    [checkpoint] = (folder / "checkpoints").glob("step-*")
    assert int(checkpoint.name[5:]) == max(losses(folder))
