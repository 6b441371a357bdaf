"""What an actor does with one segment: set the member's configuration, train, leave the result on the disk.

The folder of a segment is named by all that determines its result. A restarted driver that asks for the same
segment finds the finished result there, or the checkpoints of an unfinished one.
"""

import contextlib
import errno
import fcntl
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.config.recipe import Recipe
from ftray.core.errors import ClusterError, ConfigError, FtrayError, GroupFailed, RunStopped
from ftray.core.fs import read_json, write_json
from ftray.core.spec import parse
from ftray.strategy.elastic import bounds
from ftray.train.stop import FILE as STOP
from ftray.tune.engine import Segment
from ftray.tune.space import apply

if TYPE_CHECKING:
    from ftray.train.population import Part

RESULT = "segment.json"
_FAULTS = (ClusterError, GroupFailed)
"""No mistakes of the user."""


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
    cpu_s: float = 0.0
    """CPU seconds of the process that trained."""
    tokens: int = 0
    """Tokens trained on."""
    error: str = ""
    retry: bool = False
    """Whether another attempt may go better."""
    fatal: bool = False
    """Whether the whole search must end, once no other attempt is left that may go better."""
    stopped: bool = False
    """Whether it ended because it was asked to: so does the search."""
    signum: int | None = None
    """The signal that asked, if it was one."""


@dataclass(frozen=True)
class Task:
    """What is to be trained for one segment."""

    recipe: Recipe
    folder: Path
    start_from: Path | None
    stop_at: int


Train = Callable[[Job, Sequence[Task]], Sequence[Any]]
"""Trains tasks; for each a `ftray.train.run.Result`, or the exception that ended it."""


def run_segment(job: Job, segment: Segment) -> Outcome:
    """Train one segment, or find that it has been trained."""
    return run_segments(job, [segment])[0]


def run_segments(job: Job, segments: Sequence[Segment], train: Train | None = None) -> list[Outcome]:
    """Train segments, or find that they have been trained; what came of each.

    A user's mistake (`FtrayError`) is not worth another attempt; any other exception is, and a fault of a worker
    group. What `train` raises, instead of returning it for one task, says nothing about any of them: in the end it
    ends the search.

    Args:
        job: of the search.
        segments: what is asked for.
        train: trains those that are not there yet; None: one after the other.
    """
    found: dict[str, Outcome] = {}
    tasks: dict[str, Task] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_working_directory(job.cwd))
        for segment in sorted(segments, key=lambda segment: segment.name):
            folder = job.path(segment.name)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(_alone(folder))
                if (folder / RESULT).exists():
                    found[segment.name] = _outcome(job, read_json(folder / RESULT))
                else:
                    tasks[segment.name] = _task(job, segment, folder)
            except Exception as error:
                found[segment.name] = _failure(folder, error)
        found |= _trained(job, {s.name: s for s in segments}, tasks, train or _train_in_turn)
    return [found[segment.name] for segment in segments]


def _task(job: Job, segment: Segment, folder: Path) -> Task:
    (folder / STOP).unlink(missing_ok=True)  # it has ended an earlier attempt
    recipe = apply(parse(Recipe, job.recipe), segment.config)
    start_from = read_result(job.path(segment.checkpoint))[0] if segment.checkpoint else None
    return Task(recipe, folder, start_from, segment.stop_at)


def _trained(
    job: Job, segments: Mapping[str, Segment], tasks: Mapping[str, Task], train: Train
) -> dict[str, Outcome]:
    """Outcomes of tasks by the names of their segments; each segment's result is left in its folder."""
    if not tasks:
        return {}
    started, used = time.perf_counter(), time.process_time()
    try:
        results = train(job, list(tasks.values()))
    except Exception as error:
        return {name: _failure(task.folder, error, of_all=True) for name, task in tasks.items()}
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - used
    # Of a group, the CPUs it claimed: its workers are no children of this process.
    strategy = next(iter(tasks.values())).recipe.strategy
    workers = 0 if strategy.in_process else bounds(strategy.num_workers)[1]
    cpu_s += workers * strategy.cpus_per_worker * seconds if workers else 0.0
    tokens = {
        name: int(result.tokens) - _total_tokens(job, segments[name].checkpoint)
        for name, result in zip(tasks, results, strict=True)
        if not isinstance(result, Exception)
    }
    found = {}
    for (name, task), result in zip(tasks.items(), results, strict=True):
        try:
            if isinstance(result, Exception):
                raise result
            # What was trained together cost each its part of the tokens.
            share = tokens[name] / total if (total := sum(tokens.values())) else 1 / len(tasks)
            cost = {"tokens": tokens[name], "seconds": seconds * share, "cpu_s": cpu_s * share}
            found[name] = _outcome(job, _record(segments[name], task.folder, result, cost))
        except Exception as error:
            found[name] = _failure(task.folder, error)
    return found


def _record(segment: Segment, folder: Path, result: Any, cost: Mapping[str, float]) -> dict[str, Any]:
    record = {
        "segment": asdict(segment),
        "metrics": {key: float(value) for key, value in result.metrics.items()},
        "checkpoint": _relative(result.checkpoint, folder),
        "delta": _relative(result.delta, folder),
        "delta_digest": _delta_digest(result.delta),
        "total_tokens": int(result.tokens),
        **cost,
    }
    write_json(folder / RESULT, record)
    return record


def _failure(folder: Path, error: Exception, *, of_all: bool = False) -> Outcome:
    if _disk_is_full(error):
        remedy = "the disk is full; make room and run the same command with --resume"
        return Outcome(error=f"{folder}: {remedy}", fatal=True)
    if isinstance(error, RunStopped):
        return Outcome(error=str(error), fatal=True, stopped=True, signum=error.signum)
    told = f"{type(error).__name__}: {error}"
    if of_all:
        told += "; once it is mended, the same command with --resume goes on"
    return Outcome(
        error=told, retry=not isinstance(error, FtrayError) or isinstance(error, _FAULTS), fatal=of_all
    )


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


def _train_in_turn(job: Job, tasks: Sequence[Task]) -> list[Any]:
    found: list[Any] = []
    for task in tasks:
        try:
            found.append(_run(job, task))
        except Exception as error:
            found.append(error)
    return found


def _run(job: Job, task: Task) -> Any:
    """The result of training: in this process, or by a worker group of its own where the recipe is spread."""
    part, strategy = part_of(task), task.recipe.strategy
    if strategy.in_process:
        train = load_function(job.train_fn)
        return train(part.recipe, part.io, start_from=part.start_from, stop_at=part.stop_at)
    from ftray.train.ray_work import train_in_group

    return train_in_group(part, Path.cwd(), strategy.cpus_per_worker)


def part_of(task: Task) -> "Part":
    """What is to be trained, in the task's folder on this machine."""
    from ftray.train.io import LocalIO  # imports torch, which the driver of a search does not need
    from ftray.train.population import Part

    return Part(task.recipe, LocalIO(task.folder), task.start_from, task.stop_at)


def _outcome(job: Job, record: dict[str, Any]) -> Outcome:
    metrics = record["metrics"]
    if job.metric not in metrics:
        remedy = (
            "set `data.validation`" if job.metric == "eval_loss" else f"known: {', '.join(sorted(metrics))}"
        )
        return Outcome(error=f"metric: no segment reports {job.metric!r}; {remedy}", fatal=True)
    return Outcome(
        score=metrics[job.metric],
        metrics=metrics,
        seconds=record["seconds"],
        cpu_s=record["cpu_s"],
        tokens=record["tokens"],
    )


def _total_tokens(job: Job, name: str | None) -> int:
    """Tokens behind a checkpoint."""
    return 0 if name is None else int(read_json(job.path(name) / RESULT)["total_tokens"])


def _delta_digest(delta: Path | None) -> str | None:
    """Identity of a delta that another one descends from, which may be gone by then."""
    from ftray.delta import manifest

    if delta is None or not (delta / manifest.MANIFEST).is_file():
        return None
    return manifest.read(delta, verify=False).digest


def _disk_is_full(error: BaseException | None) -> bool:
    """True if an error, or what led to it, is that of a full disk: another attempt would meet it too."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # safetensors' own error has no number
            return True
        error = error.__cause__ or error.__context__
    return False


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
