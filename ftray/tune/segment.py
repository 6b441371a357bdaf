"""What an actor does with one segment: set the member's configuration, train, leave the result on the disk.

The folder of a segment is named by all that determines its result. A restarted driver that asks for the same
segment finds the finished result there, or the checkpoints of an unfinished one.
"""

import contextlib
import fcntl
import importlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError, FtrayError
from ftray.core.fs import read_json, write_json
from ftray.core.spec import dump, parse
from ftray.tune.engine import Segment
from ftray.tune.space import apply

RESULT = "segment.json"


@dataclass(frozen=True)
class Job:
    """What all segments of a search have in common: plain data, safe to send anywhere."""

    folder: str
    """Folder of the search; segments lie below `segments/`."""
    recipe: dict[str, Any]
    """The recipe as plain data, before a member's configuration."""
    train_fn: str
    metric: str
    cwd: str
    """Relative paths in the recipe start here."""

    def path(self, name: str) -> Path:
        """The folder of a segment."""
        return Path(self.folder) / "segments" / name


@dataclass(frozen=True)
class Outcome:
    """What came of a segment: a score, or why there is none."""

    score: float | None = None
    metrics: dict[str, float] | None = None
    seconds: float = 0.0
    error: str = ""
    retry: bool = False
    """Whether another attempt may go better."""
    fatal: bool = False
    """Whether the whole search must end."""


def segment_recipe(recipe: Recipe, num_steps: int) -> dict[str, Any]:
    """A user's recipe as the search runs it, as plain data.

    Schedules span all segments, nothing is saved or validated but at a segment's end, and each member is
    trained by one worker: how a run is spread changes its result by rounding only. `bf16: auto` is a timing,
    by which members would differ by chance; here it means float32.
    """
    limits = {"max_steps": num_steps, "num_train_epochs": None, "max_time_s": None}
    quiet = {"eval_steps": None, "save_steps": None, "save_total_limit": 1}
    data = dump(recipe)
    data["train"] |= limits | quiet
    if data["train"]["bf16"] == "auto":
        data["train"]["bf16"] = False
    return {**data, "strategy": "single", "tracking": []}


def run_segment(job: Job, segment: Segment) -> Outcome:
    """Train one segment, or find that it has been trained.

    A user's mistake (`FtrayError`) is not worth another attempt; any other exception is.
    """
    folder = job.path(segment.name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(folder), _working_directory(job.cwd):
            if (folder / RESULT).exists():
                return _outcome(job, read_json(folder / RESULT))
            return _outcome(job, _train(job, segment, folder))
    except FtrayError as error:
        return Outcome(error=f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}", retry=True)


def read_result(folder: Path) -> tuple[Path | None, Path | None]:
    """Checkpoint and delta folder of a finished segment."""
    result = read_json(folder / RESULT)
    checkpoint, delta = (folder / result[key] if result[key] else None for key in ("checkpoint", "delta"))
    return checkpoint, delta


def load_function(path: str) -> Any:
    """The function behind `package.module:function`.

    Raises:
        ConfigError: if it cannot be imported.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"train_fn: {path!r} cannot be imported ({error}); write `module:function`"
        ) from None


def _train(job: Job, segment: Segment, folder: Path) -> dict[str, Any]:
    from ftray.train.io import LocalIO  # imports torch, which the driver of a search does not need

    recipe = apply(parse(Recipe, job.recipe), segment.config)
    start_from = read_result(job.path(segment.checkpoint))[0] if segment.checkpoint else None
    started = time.perf_counter()
    result = load_function(job.train_fn)(
        recipe, LocalIO(folder), start_from=start_from, stop_at=segment.stop_at
    )
    record = {
        "segment": asdict(segment),
        "metrics": {key: float(value) for key, value in result.metrics.items()},
        "checkpoint": _relative(result.checkpoint, folder),
        "delta": _relative(result.delta, folder),
        "seconds": time.perf_counter() - started,
    }
    write_json(folder / RESULT, record)
    return record


def _outcome(job: Job, record: dict[str, Any]) -> Outcome:
    metrics = record["metrics"]
    if job.metric not in metrics:
        remedy = (
            "set `data.validation`" if job.metric == "eval_loss" else f"known: {', '.join(sorted(metrics))}"
        )
        return Outcome(error=f"metric: no segment reports {job.metric!r}; {remedy}", fatal=True)
    return Outcome(score=metrics[job.metric], metrics=metrics, seconds=record["seconds"])


def _relative(path: Path | None, folder: Path) -> str | None:
    return None if path is None else Path(path).resolve().relative_to(folder.resolve()).as_posix()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for an actor of a killed driver that still works here; Ray ends it within seconds."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _working_directory(path: str) -> Iterator[None]:
    """Work where the driver does, as far as this node has that folder."""
    before = Path.cwd()
    with contextlib.suppress(FileNotFoundError):
        os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
