"""Runs of real workers that hang or are told to end: each finishes with the curve of one process."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftray.config.recipe import Recipe
from ftray.core.errors import FtrayError, RunStopped, TrainError
from ftray.core.fs import read_json
from ftray.train.io import LocalIO
from ftray.train.ray_launch import launch
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

DDP = {"type": "ddp", "num_workers": 2, "cpus_per_worker": 0.5, "max_failures": 1}
STEPS = 30
RATE = {"optim__learning_rate": 1e-3}
"""A larger one makes more of rounding than 1e-5 within so many steps."""


def losses(folder: Path) -> dict[int, float]:
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "grad_norm" in record}


def recipe_of(make_recipe: MakeRecipe, name: str, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "strategy": DDP,
        "objective": {"type": "tests.slow_objective:Slow", "pause_s": 0.05},
        "train__max_steps": STEPS,
        "train__save_steps": 4,
        "train__watchdog_s": 4.0,
        "data__validation": [],
    }
    return make_recipe(name, **settings | RATE | changes)


def same_curve(make_recipe: MakeRecipe, folder: Path, steps: int = STEPS) -> None:
    """Compare with one process; each step is there once."""
    reference = make_recipe(
        f"reference{steps}",
        train__max_steps=STEPS,
        data__validation=[],
        objective={"type": "tests.slow_objective:Slow", "pause_s": 0.0},
        **RATE,
    )
    run_dir = Path(reference.output_dir) / reference.name
    train(reference, LocalIO(run_dir), stop_at=steps)
    assert losses(folder) == pytest.approx(losses(run_dir), rel=1e-5)


def progress(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "progress" / f"rank-{rank}.json")
    return found


def once(at: int, act: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """Act when a run has come to a step."""
    done: list[bool] = []

    def look(record: dict[str, Any]) -> None:
        if record["step"] >= at and not done:
            done.append(True)
            act()

    return look


@pytest.mark.slow
@pytest.mark.parametrize("hang", ["sleep", "gil", "stop"])
def test_a_worker_that_hangs(make_recipe: MakeRecipe, tmp_path: Path, hang: str) -> None:
    """Found in the watchdog's time, every rank's stacks saved, the group started again, the curve the same."""
    fault = {"hang": hang, "at": 25, "rank": 1, "once": str(tmp_path / "once")}
    recipe = recipe_of(make_recipe, f"hang-{hang}", objective={"type": "tests.faults:Faulty", **fault})
    folder = Path(recipe.output_dir) / recipe.name
    began: list[float] = []
    ended: list[float] = []

    def watch() -> None:
        while not (tmp_path / "once").exists():
            time.sleep(0.05)
        began.append(time.monotonic())
        pid = progress(folder, 1)["pid"]
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
        ended.append(time.monotonic())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    launch(recipe)
    thread.join(1)
    found_s = ended[0] - began[0]
    assert 3.0 < found_s < 4.0 + 8.0, "the limit, then time for everybody's stacks"
    stacks = {rank: list((folder / "stacks").glob(f"rank-{rank}-*.txt")) for rank in (0, 1)}
    assert any("faults.py" in path.read_text() for path in stacks[1]), "the hung rank's"
    assert any("all_reduce" in path.read_text() for path in stacks[0]), "and the one's that waited for it"
    reference = make_recipe("reference", train__max_steps=STEPS, data__validation=[], **RATE)
    train(reference, LocalIO(Path(reference.output_dir) / "reference"))
    assert losses(folder) == pytest.approx(losses(Path(reference.output_dir) / "reference"), rel=1e-5)


@pytest.mark.slow
def test_a_run_that_always_hangs_says_so(make_recipe: MakeRecipe) -> None:
    recipe = recipe_of(
        make_recipe,
        "hangs",
        strategy=DDP | {"max_failures": 0},
        objective={"type": "tests.faults:Faulty", "hang": "sleep", "at": 25, "rank": 1},
    )
    with pytest.raises(
        TrainError, match=r"rank \d made no progress in step \d+ .*stacks.*`train\.watchdog_s`"
    ):
        launch(recipe)


def test_sigterm_to_a_worker(make_recipe: MakeRecipe) -> None:
    """It commits and returns with the others; the run goes on by itself and no step is done twice."""
    recipe = recipe_of(make_recipe, "term-worker", train__save_steps=None, train__max_steps=14)
    folder = Path(recipe.output_dir) / recipe.name
    seen: list[int] = []
    kill = once(4, lambda: os.kill(progress(folder, 1)["pid"], signal.SIGTERM))

    def look(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        kill(record)

    assert launch(recipe, on_record=look).step == 14
    assert seen == sorted(seen)
    same_curve(make_recipe, folder, steps=14)


@pytest.mark.slow
def test_sigterm_to_the_driver(make_recipe: MakeRecipe) -> None:
    recipe = recipe_of(make_recipe, "term-driver", train__save_steps=None)
    folder = Path(recipe.output_dir) / recipe.name
    with pytest.raises(RunStopped, match=r"stopped after step \d+ \(SIGTERM\).*`--resume`") as stopped:
        launch(recipe, on_record=once(8, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stopped.value.signum == signal.SIGTERM
    done = max(losses(folder))
    [checkpoint] = (folder / "checkpoints").glob("step-*")
    assert int(checkpoint.name[5:]) == done < STEPS
    assert launch(recipe, resume=True).step == STEPS
    same_curve(make_recipe, folder)


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        recipe = recipe_of(make_recipe, "full", output_dir=str(disk), train__save_steps=8)

        def fill() -> None:
            (disk / "ballast").write_bytes(
                bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 60_000)
            )

        with pytest.raises(FtrayError, match=r"step-\d+: .*No space left on device") as error:
            launch(recipe, on_record=once(10, fill))
        assert "\n" not in str(error.value)
        (disk / "ballast").unlink()
        assert launch(recipe, resume=True).step == STEPS
        same_curve(make_recipe, disk / "full")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
