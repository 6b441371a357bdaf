"""From a recipe to a finished run: in this process, or as a Ray Train worker group."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.cluster.ray_room import wait_for_room
from ftray.cluster.ray_session import session
from ftray.config.recipe import Recipe
from ftray.core.errors import CheckpointError
from ftray.core.types import Progress, no_progress
from ftray.data.store import Folder
from ftray.strategy.elastic import bounds
from ftray.train.check import check_model
from ftray.train.io import LocalIO, Record
from ftray.train.opaque.context import FOLDER as TRAINER
from ftray.train.population import Part
from ftray.train.ray_group import resources_of
from ftray.train.ray_work import train_in_group
from ftray.train.run import Result
from ftray.train.stop import FILE as STOP
from ftray.train.worker import train

_TASK_CPUS = 0.5


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
        RunStopped: if a signal or the file `stop` in the run folder asked for it; `resume` goes on.
        FtrayError: what the run itself raised, also from inside a worker.
    """
    run_dir = run_dir_of(recipe).resolve()
    if not resume and (any((run_dir / "checkpoints").glob("step-*")) or (run_dir / TRAINER).is_dir()):
        raise CheckpointError(f"{run_dir}: holds a run already; use `--resume`, or another `name`")
    (run_dir / STOP).unlink(missing_ok=True)
    check_model(recipe)  # a wrong base or adapter is told before rows are prepared and workers start
    if recipe.strategy.in_process:
        io = LocalIO(run_dir, on_record, on_prepare)
        return train(recipe, io, accept_changed_data=accept_changed_data)
    cwd = (
        Path.cwd()
    )  # of a submitted job it may be replaced by the same, unpacked again, while rows are prepared
    with session():
        from ftray.train.ray_io import RayIO

        cpus_per_worker, cpus_per_task = _share_cpus(recipe)
        train_shards, validation_shards, background = _prepare(recipe, on_prepare, cpus_per_task)
        shards = (train_shards, validation_shards)
        try:
            least, _ = bounds(recipe.strategy.num_workers)
            wait_for_room(least, resources_of(least, cpus_per_worker), recipe.strategy.wait_for_room_s)
            part = Part(recipe, RayIO(run_dir, shards))
            return train_in_group(
                part, cwd, cpus_per_worker, on_record, accept_changed_data=accept_changed_data
            )
        finally:
            if background is not None:
                background.close()


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
    _, workers = bounds(strategy.num_workers)
    left = total - workers * strategy.cpus_per_worker
    if left >= _TASK_CPUS:
        return strategy.cpus_per_worker, min(1.0, left)
    return round((total - _TASK_CPUS) / workers, 3), _TASK_CPUS


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
