"""Committing a checkpoint: killed at every line of it, on a disk that is full, with what must stay."""

import os
import shutil
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from ftray.core.errors import CheckpointError
from ftray.core.fs import read_json
from ftray.strategy.single import Single
from ftray.train.checkpoint import Checkpoints, State, read_manifest
from ftray.train.io import LocalIO
from ftray.train.ray_launch import launch
from ftray.train.retention import pin, prune, unpin
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe

WATCHED = ("transaction.py", "checkpoint.py", "retention.py", "fs.py", "pieces.py", "tensor_file.py")
IN_MEMORY = ("take", "state_tensors")
"""What only copies: a kill there is a kill before the commit."""
IDENTITY = dict.fromkeys(("run", "structure", "data", "seed", "global_batch_size", "order"), "same")


class Trained:
    """A parameter whose value says after which step it was."""

    def __init__(self) -> None:
        self.parameters = {"weight": torch.nn.Parameter(torch.zeros(8))}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0)

    def at(self, step: int) -> "Trained":
        for parameter in self.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.fill_(step)
        return self

    def commit(self, folder: Path, step: int, life: str) -> None:
        snapshot = Single().snapshot(self.parameters, [self.optimizer])
        checkpoints = Checkpoints(folder, IDENTITY, 1, life)
        checkpoints.commit(State(step=step), snapshot, 1, wait=True)

    def restore(self, folder: Path) -> int:
        checkpoints = Checkpoints(folder, IDENTITY, 1, "reader")
        newest = checkpoints.newest()
        assert newest is not None
        state = checkpoints.restore(newest, Single(), self.parameters, [self.optimizer], same_run=True)
        return state.step


def commit_until(folder: Path, step: int, line: int) -> bool:
    """Commit in a process of its own that ends at the n-th line of the code; True if it came to the end."""
    trained = Trained().at(step)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(WATCHED) or frame.f_code.co_name in IN_MEMORY:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os._exit(9)
        return trace

    try:
        threading.settrace(trace)
        sys.settrace(trace)
        trained.commit(folder, step, f"life{step}")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_every_line_of_the_commit(tmp_path: Path, stride: int) -> None:
    """Quickly at every ninth. The newest checkpoint is the one before or this one, and whole."""
    folder = tmp_path / "checkpoints"
    Trained().at(1).commit(folder, 1, "first")
    line, kills, step, seen, done = 1, 0, 2, set(), False
    while not done:
        done = commit_until(folder, step, line)
        kills, line = kills + (not done), line + stride
        for path in folder.glob("step-*"):
            read_manifest(path)  # raises for one that is damaged
        reader = Trained()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = reader.restore(folder)
        assert found in (step - 1, step)
        assert reader.parameters["weight"].tolist() == [float(found)] * 8
        assert not list(folder.glob(".tmp-*")) and not list(folder.glob("damaged-*"))
        seen.add(found - step)
        step = found + 1
        prune(folder, 1, keep_best=False)  # so that every life has as much to do
    assert kills * stride > 200 and seen == {-1, 0}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(make_recipe: MakeRecipe, small_disk: Path) -> None:
    recipe = make_recipe(output_dir=str(small_disk), train__save_steps=2, train__save_total_limit=3)
    folder, ballast = small_disk / recipe.name, small_disk / "ballast"

    def fill(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            free = shutil.disk_usage(small_disk).free
            ballast.write_bytes(bytes(free - 30_000))

    with pytest.raises(
        CheckpointError, match=r"step-00000004: .*No space left on device.*`--resume`"
    ) as error:
        train(recipe, LocalIO(folder, on_record=fill))
    assert "\n" not in str(error.value)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    read_manifest(folder / "checkpoints" / "step-00000002")
    ballast.unlink()
    assert launch(recipe, resume=True).step == 6
    whole = make_recipe("whole")
    train(whole, LocalIO(Path(whole.output_dir) / "whole"))
    assert losses(folder) == losses(Path(whole.output_dir) / "whole")


def test_a_file_that_may_not_grow(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The same where nothing can be mounted: the limit of this process's files."""
    resource = pytest.importorskip("resource")
    recipe = make_recipe(train__save_steps=2)
    folder = Path(recipe.output_dir) / recipe.name
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(CheckpointError, match=r"step-00000004: .*File too large"):
            train(recipe, LocalIO(folder, on_record=limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert launch(recipe, resume=True).step == 6


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_records(folder / "metrics.jsonl") if "grad_norm" in record]


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("stop_at", [None, 4])
def test_the_last_checkpoint_knows_its_validation_loss(make_recipe: MakeRecipe, stop_at: int | None) -> None:
    """Also where `save_steps` divides the last step, or a segment ends."""
    settings = {"train__save_steps": 2, "train__eval_steps": 2, "train__save_best": True}
    recipe = make_recipe(**settings, train__max_steps=6)
    result = train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), stop_at=stop_at)
    state = read_json(result.checkpoint / "manifest.json")["state"]
    assert state["step"] == (stop_at or 6)
    assert state["eval_loss"] == result.metrics["eval_loss"] == state["best_eval_loss"]


def test_the_best_and_the_pinned_stay(make_recipe: MakeRecipe) -> None:
    """A rate that ruins the model after a while: the best checkpoint is an early one."""
    recipe = make_recipe(
        train__max_steps=12,
        train__eval_steps=2,
        train__save_steps=3,
        train__save_best=True,
        train__save_total_limit=1,
        optim__learning_rate=0.6,
    )
    folder = Path(recipe.output_dir) / recipe.name

    def look(record: dict[str, Any]) -> None:
        if record["step"] == 4:  # before the checkpoint of this step would remove that one
            pin(folder / "checkpoints", "other", 3)

    train(recipe, LocalIO(folder, on_record=look))
    records = read_records(folder / "metrics.jsonl")
    seen = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    best = min(seen, key=lambda step: (seen[step], step))
    assert best < 12, "the last is not the best"
    assert kept(folder) == sorted({best, 3, 12})
    state = read_json(folder / "checkpoints" / f"step-{best:08d}" / "manifest.json")["state"]
    assert state["eval_loss"] == state["best_eval_loss"] == seen[best]
    unpin(folder / "checkpoints", "other")
    prune(folder / "checkpoints", 1, keep_best=False)
    assert kept(folder) == [12]
