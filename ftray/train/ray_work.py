"""What the workers of a group train: a run, or the members of a population."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.errors import FtrayError
from ftray.core.fs import read_json
from ftray.core.spec import dump, parse
from ftray.train.io import Record
from ftray.train.population import Part, Population
from ftray.train.ray_group import read_error, run_group, write_error
from ftray.train.run import Result
from ftray.train.worker import train

FAILED = "failed.json"
"""In the folder of a member that failed alone: its error, read and removed by the driver."""

_Packed = dict[str, Any]
"""A part as plain data, since the classes a recipe names may lie in a folder that a worker has yet to enter."""


def train_in_group(
    part: Part,
    cwd: Path,
    cpus_per_worker: float,
    on_record: Callable[[Record], None] | None = None,
    *,
    accept_changed_data: bool = False,
) -> Result:
    """`ftray.train.worker.train` on every worker of a group; see `run_group` for the other arguments and errors."""
    with contextlib.closing(part.io):
        body = functools.partial(_train, _packed(part), accept_changed_data)
        run_group(part.recipe, part.io.run_dir, cwd, cpus_per_worker, body, on_record)
        return _result(part.io.run_dir)


def train_population_in_group(
    parts: Sequence[Part], cwd: Path, rows_per_pass: int | None
) -> list[Result | FtrayError]:
    """`Population.train` on every worker of a group, whose folder is the first part's; raises as `run_group`."""
    recipe, run_dir = parts[0].recipe, parts[0].io.run_dir
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(contextlib.closing(part.io))
        body = functools.partial(_train_population, [_packed(part) for part in parts], rows_per_pass)
        run_group(recipe, run_dir, cwd, recipe.strategy.cpus_per_worker, body)
        folders = [part.io.run_dir for part in parts]
        return [read_error(folder / FAILED) or _result(folder) for folder in folders]


def _train(packed: _Packed, accept_changed_data: bool) -> None:
    part = _unpacked(packed)
    train(
        part.recipe,
        part.io,
        start_from=part.start_from,
        stop_at=part.stop_at,
        accept_changed_data=accept_changed_data,
    )


def _train_population(packed: Sequence[_Packed], rows_per_pass: int | None) -> None:
    train_members([_unpacked(one) for one in packed], rows_per_pass)


def train_members(parts: Sequence[Part], rows_per_pass: int | None) -> None:
    """`Population.train` on one worker; the errors of members that failed alone are left in their folders."""
    recipe = parts[0].recipe
    main = recipe.strategy.dp_rank == 0
    files = [part.io.run_dir / FAILED for part in parts]
    if main:
        for file in files:
            file.unlink(missing_ok=True)  # of an earlier start of the group
    found = Population(recipe).train(parts, rows_per_pass=rows_per_pass)
    if main:
        for file, result in zip(files, found, strict=True):
            if isinstance(result, FtrayError):
                write_error(file, result)


def _packed(part: Part) -> _Packed:
    return {
        "recipe": dump(part.recipe),
        "run_dir": part.io.run_dir,
        "shards": part.io.prepare(part.recipe),
        "start_from": part.start_from,
        "stop_at": part.stop_at,
    }


def _unpacked(packed: _Packed) -> Part:
    from ftray.train.ray_io import RayIO

    io = RayIO(packed["run_dir"], packed["shards"])
    return Part(parse(Recipe, packed["recipe"]), io, packed["start_from"], packed["stop_at"])


def _result(run_dir: Path) -> Result:
    saved = read_json(run_dir / "result.json")
    paths = {key: Path(saved[key]) for key in ("run_dir", "checkpoint", "delta") if saved[key]}
    return Result(**{**saved, **paths})
