"""Two real Ray Train workers: the same curve as one process, through kill -9 of the driver and of a worker."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ftray.cluster import allocator, ray_room
from ftray.config.load import write_resolved
from ftray.config.recipe import Recipe
from ftray.core.errors import ClusterError, FtrayError
from ftray.core.fs import read_json
from ftray.train.io import LocalIO
from ftray.train.ray_launch import launch
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe

pytestmark = pytest.mark.ray

DDP = {"type": "ddp", "num_workers": 2, "cpus_per_worker": 0.5}
STEPS = 24
# A larger learning rate makes more of rounding than 1e-5 within so many steps.
LONG = {"train__max_steps": STEPS, "train__global_batch_size": 16, "optim__learning_rate": 1e-3}


def losses(folder: Path) -> dict[int, float]:
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "grad_norm" in record}


def slow_recipe(make_recipe: MakeRecipe, name: str, pid_file: str = "", pause_s: float = 0.05) -> Recipe:
    """A run that takes long enough to be killed in the middle."""
    return make_recipe(
        name,
        strategy=DDP,
        train__save_steps=2,
        objective={"type": "tests.slow_objective:Slow", "pid_file": pid_file, "pause_s": pause_s},
        **LONG,
    )


def undisturbed(make_recipe: MakeRecipe) -> dict[int, float]:
    """The same run on one process: the reference."""
    recipe = make_recipe("reference", **LONG)
    train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name))
    return losses(Path(recipe.output_dir) / recipe.name)


def test_two_workers_and_the_errors_they_bring_back(
    make_recipe: MakeRecipe,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = make_recipe("reference")
    train(reference, LocalIO(Path(reference.output_dir) / reference.name))
    recipe = make_recipe("ddp", strategy=DDP)
    seen: list[int] = []
    allocators: set[bool] = set()

    def look(record: dict[str, int]) -> None:
        seen.append(record["step"])
        for progress in Path(recipe.output_dir).glob("ddp/progress/rank-*.json"):
            with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
                maps = Path(f"/proc/{read_json(progress)['pid']}/maps").read_text()
                allocators.add("libjemalloc" in maps)

    result = launch(recipe, on_record=look)
    assert allocators == {bool(allocator.environment())}
    assert losses(result.run_dir) == pytest.approx(losses(Path(reference.output_dir) / "reference"), rel=1e-5)
    assert result.delta is not None and (result.delta / "adapter_model.safetensors").is_file() and seen
    monkeypatch.setattr(ray_room, "_SILENT_S", 0.2)
    wide = {"cpus_per_worker": 8, "wait_for_room_s": 1.0}
    with pytest.raises(
        ClusterError, match=r"no room in 1 s for 2 workers of 8 CPU each; the cluster has 2 CPU"
    ):
        launch(make_recipe("wide", strategy=DDP | wide))
    assert "waiting for room for 2 workers of 8 CPU each; the cluster has 2 CPU" in capsys.readouterr().err
    with pytest.raises(FtrayError, match=r"not finite; lower `optim\.learning_rate`"):
        launch(make_recipe("diverges", strategy=DDP | {"max_failures": 0}, optim__learning_rate=1e30))


def start(recipe: Recipe, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    file = folder / f"{recipe.name}.yaml"
    write_resolved(recipe, file)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "ftray.cli.main", "run", str(file), *flags]
    return subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while max(losses(folder), default=0) < step:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)


def raylet_of(process: subprocess.Popen[bytes]) -> int:
    children = psutil.Process(process.pid).children(recursive=True)
    [found] = [child.pid for child in children if child.name() == "raylet"]
    return found


@pytest.mark.parametrize("victim", ["driver", pytest.param("raylet", marks=pytest.mark.slow)])
def test_kill_and_resume(make_recipe: MakeRecipe, tmp_path: Path, victim: str) -> None:
    # Workers outlive their raylet by some seconds.
    recipe = slow_recipe(make_recipe, "killed", pause_s=0.05 if victim == "driver" else 0.4)
    folder = Path(recipe.output_dir) / recipe.name
    process = start(recipe, tmp_path)
    wait_for_step(folder, 9, process)
    os.kill(process.pid if victim == "driver" else raylet_of(process), signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert max(losses(folder)) < STEPS and not (folder / "result.json").exists()
    resumed = start(recipe, tmp_path, "--resume")
    assert resumed.wait(timeout=180) == 0
    assert losses(folder) == pytest.approx(undisturbed(make_recipe), rel=1e-5)
    assert read_json(folder / "result.json")["step"] == STEPS
    assert sorted(losses(folder)) == list(range(1, STEPS + 1)), "no step lost, none twice"


@pytest.mark.slow
def test_kill_a_worker(make_recipe: MakeRecipe, ray_cluster: None, tmp_path: Path) -> None:
    """Ray Train starts the group again from the newest checkpoint; the driver goes on."""
    recipe = slow_recipe(make_recipe, "worker", pid_file=str(tmp_path / "rank0.pid"))
    folder = Path(recipe.output_dir) / recipe.name
    killed = []

    def kill_once(record: dict[str, float]) -> None:
        pid = tmp_path / "rank0.pid"
        if record["step"] >= 7 and not killed and pid.is_file():
            killed.append(int(pid.read_text()))
            os.kill(killed[0], signal.SIGKILL)

    launch(recipe, on_record=kill_once)
    assert killed, "the worker was killed"
    assert losses(folder) == pytest.approx(undisturbed(make_recipe), rel=1e-5)
