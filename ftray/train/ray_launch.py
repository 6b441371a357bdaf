"""From a recipe to a finished run: in this process, or as a Ray Train worker group."""

import functools
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.cluster.ray_session import session
from ftray.config.recipe import Recipe
from ftray.core import errors
from ftray.core.errors import CheckpointError, FtrayError, TrainError
from ftray.core.fs import read_json, write_json
from ftray.core.spec import dump, parse
from ftray.core.types import Progress, no_progress
from ftray.data.store import Folder
from ftray.train.check import check_model
from ftray.train.io import LocalIO, Record
from ftray.train.opaque.context import FOLDER as TRAINER
from ftray.train.run import Result
from ftray.train.track.jsonl import FILE
from ftray.train.worker import train

MISTAKE = "mistake.json"
"""Written by a worker that meets a user's mistake, read and removed by the driver."""

_POLL_S = 0.5
_TASK_CPUS = 0.5
_RAY_SETTINGS = {
    # A group that cannot start for lack of room should say so in minutes, not hang.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


def run_dir_of(recipe: Recipe) -> Path:
    """Folder of a recipe's run."""
    return Path(recipe.output_dir).expanduser() / recipe.name


def launch(
    recipe: Recipe,
    *,
    resume: bool = False,
    accept_changed_data: bool = False,
    on_record: Callable[[Record], None] | None = None,
    on_prepare: Progress = no_progress,
) -> Result:
    """Train a recipe wherever its strategy says.

    Args:
        recipe: the run.
        resume: go on with the run of the same name; without it such a run is left alone and refused.
        accept_changed_data: go on though the rows, the seed or the batch size have changed since.
        on_record: called with every record of metrics as it appears.
        on_prepare: progress of the preparation of rows.

    Raises:
        CheckpointError: if the run folder has a run and `resume` was not asked for.
        FtrayError: what the run itself raised, also from inside a worker.
    """
    run_dir = run_dir_of(recipe).resolve()
    if not resume and (any((run_dir / "checkpoints").glob("step-*")) or (run_dir / TRAINER).is_dir()):
        raise CheckpointError(f"{run_dir}: holds a run already; use `--resume`, or another `name`")
    check_model(recipe)  # a wrong base or adapter is told before rows are prepared and workers start
    if recipe.strategy.in_process:
        io = LocalIO(run_dir, on_record, on_prepare)
        return train(recipe, io, accept_changed_data=accept_changed_data)
    with session():
        return _launch_workers(recipe, run_dir, accept_changed_data, on_record, on_prepare)


def _launch_workers(
    recipe: Recipe,
    run_dir: Path,
    accept_changed_data: bool,
    on_record: Callable[[Record], None] | None,
    on_prepare: Progress,
) -> Result:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    cpus_per_worker, cpus_per_task = _share_cpus(recipe)
    train_shards, validation_shards, background = _prepare(recipe, on_prepare, cpus_per_task)
    for key, value in _RAY_SETTINGS.items():
        os.environ.setdefault(key, value)
    strategy = recipe.strategy
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / MISTAKE).unlink(missing_ok=True)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": dump(recipe),
            "run_dir": str(run_dir),
            "shards": (train_shards, validation_shards),
            "cwd": str(Path.cwd()),
            "accept_changed_data": accept_changed_data,
        },
        scaling_config=ScalingConfig(
            num_workers=strategy.num_workers,
            resources_per_worker={"CPU": cpus_per_worker},
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run_dir),
            failure_config=FailureConfig(max_failures=strategy.max_failures),
        ),
    )
    with _Tail(run_dir / FILE, on_record):
        try:
            trainer.fit()
        except Exception as error:
            raise _mistake(run_dir) or _ours(error) from error
        finally:
            if background is not None:
                background.close()
    if mistake := _mistake(run_dir):
        raise mistake
    saved = read_json(run_dir / "result.json")
    paths = {key: Path(saved[key]) for key in ("run_dir", "checkpoint", "delta") if saved[key]}
    return Result(**{**saved, **paths})


def _share_cpus(recipe: Recipe) -> tuple[float, float]:
    """CPUs that a training worker and a preparing task claim.

    With `data.stream` both run at once: workers that would claim the whole cluster leave half a CPU to the tasks,
    which otherwise would wait for them, as they wait for the tasks' rows.
    """
    import ray

    strategy = recipe.strategy
    if not recipe.data.stream:
        return strategy.cpus_per_worker, 1.0
    total = float(ray.cluster_resources().get("CPU", 1.0))
    left = total - strategy.num_workers * strategy.cpus_per_worker
    if left >= _TASK_CPUS:
        return strategy.cpus_per_worker, min(1.0, left)
    return round((total - _TASK_CPUS) / strategy.num_workers, 3), _TASK_CPUS


def _prepare(recipe: Recipe, progress: Progress, cpus_per_task: float) -> tuple[Folder, Folder | None, Any]:
    """Prepared training and validation shards; with `data.stream`, also what goes on preparing them."""
    from ftray.data.grow import Background
    from ftray.data.prepare import Preparation
    from ftray.data.ray_prepare import prepare, run_on_ray

    if recipe.trainer is not None:
        return "", None, None  # it reads the rows itself
    data, tokenizer = recipe.data, recipe.model.tokenizer
    validation = prepare(data, tokenizer, "validation", progress) if data.validation else None
    if not data.stream:
        return prepare(data, tokenizer, "train", progress), validation, None
    run = functools.partial(run_on_ray, cpus_per_task=cpus_per_task)
    background = Background(Preparation(data, tokenizer, "train"), run, progress)
    return background.folder, validation, background


def _worker(config: dict[str, Any]) -> None:
    """Body of one Ray Train worker: the same `train` as everywhere.

    Ray Train starts a failed group again, which is right for a machine's fault and no use for a user's mistake:
    that one is written down, and the next group ends at once for the driver to tell it.
    """
    import torch

    from ftray.train.ray_io import RayIO

    run_dir = Path(config["run_dir"])
    if (run_dir / MISTAKE).exists():
        return
    # Ray starts workers in a folder of its own; the recipe's relative paths and modules mean the driver's.
    if Path(config["cwd"]).is_dir():
        os.chdir(config["cwd"])
        sys.path.insert(0, config["cwd"])
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    try:
        train(
            parse(Recipe, config["recipe"]),
            RayIO(run_dir, config["shards"]),
            accept_changed_data=config["accept_changed_data"],
        )
    except FtrayError as error:
        write_json(run_dir / MISTAKE, {"type": type(error).__name__, "message": str(error)})
        raise


def _mistake(run_dir: Path) -> FtrayError | None:
    """What a worker wrote down about a user's mistake."""
    if not (run_dir / MISTAKE).exists():
        return None
    told = read_json(run_dir / MISTAKE)
    (run_dir / MISTAKE).unlink()
    found: FtrayError = getattr(errors, told["type"], TrainError)(told["message"])
    return found


def _ours(error: BaseException) -> FtrayError:
    """One line that names the last cause of a worker group's failure."""
    failures = getattr(error, "worker_failures", {})
    shown = next(iter(failures.values()), error)
    lines = str(shown).strip().splitlines()
    return TrainError(f"the worker group failed: {lines[-1] if lines else type(shown).__name__}")


class _Tail:
    """Calls `on_record` with the records a run in other processes writes, while a block runs."""

    def __init__(self, path: Path, on_record: Callable[[Record], None] | None) -> None:
        self._path, self._on_record = path, on_record
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="ftray-tail", daemon=True)

    def __enter__(self) -> "_Tail":
        if self._on_record:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._on_record:
            self._thread.join()

    def _follow(self) -> None:
        # An older life of the run may have left its file; what it holds is no news.
        offset = self._path.stat().st_size if self._path.is_file() else 0
        while not self._stop.wait(_POLL_S):
            if not self._path.is_file():
                continue
            if self._path.stat().st_size < offset:  # a resumed run has written it anew
                offset = 0
            with self._path.open("rb") as file:
                file.seek(offset)
                lines = file.read().split(b"\n")
            offset += sum(len(line) + 1 for line in lines[:-1])
            if len(lines) > 1 and self._on_record:
                self._on_record(json.loads(lines[-2]))
