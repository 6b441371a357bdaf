"""Batch inference through Ray Data: byte ranges of the input to a pool of actors that hold an engine each."""

import json
import logging
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from ftray.core.errors import ClusterError, DataError, FtrayError
from ftray.core.fs import replace_file
from ftray.core.types import Progress, no_progress
from ftray.data.source import Unit, find_files, split_units
from ftray.data.tokenise import tokeniser
from ftray.engine.api import Sampling
from ftray.engine.batch import UnitResult, generate_unit, numbered

_UNIT_BYTES = 256 << 10
_DELTA = "delta"


@dataclass(frozen=True)
class Generated:
    """What a batch inference came to."""

    output: Path
    """JSON lines in input order."""
    num_rows: int
    """Rows answered."""
    num_quarantined: int
    """Rows that have no answer."""
    quarantine: Path | None
    """Why not: file, offset, line and reason of each; None if there are none."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know."""

    base: str
    engine: Any
    """Settings of the engine."""
    delta: str | None
    """Folder of the delta; None: the base."""
    sampling: Sampling


def generate(
    job: Job,
    source: Path,
    output: Path,
    *,
    num_workers: int = 1,
    num_gpus: float = 0.0,
    progress: Progress = no_progress,
) -> Generated:
    """Answer the rows of a JSON lines file on the Ray session of this process.

    Args:
        job: base, delta and sampling.
        source: the rows; on storage that every node sees.
        output: where the answers go; replaced as a whole, when all are there.
        num_workers: engines.
        num_gpus: GPUs of each.
        progress: called with input bytes done and in all.

    Raises:
        ClusterError: if there is no Ray session.
        DataError: if the input cannot be read.
        ModelError, DeltaError: if base or delta cannot be loaded.
    """
    if not ray.is_initialized():
        raise ClusterError("not connected to Ray; open a session first")
    units = split_units(find_files([str(source)]), _UNIT_BYTES)
    if not units:
        raise DataError(f"{source}: empty; put one JSON object on each line")
    total = sum(unit.stop - unit.start for unit in units)
    done = num_rows = num_bad = 0
    bad_path = output.with_name(output.name + ".quarantine.jsonl")
    with (
        replace_file(output) as rows_path,
        replace_file(bad_path) as bad_rows_path,
        rows_path.open("w", encoding="utf-8") as rows,
        bad_rows_path.open("w", encoding="utf-8") as bad,
    ):
        for result in numbered(_run(job, units, num_workers, num_gpus)):
            rows.writelines(_line(row) for row in result.answered)
            bad.writelines(_line(row) for row in result.quarantined)
            num_rows, num_bad = num_rows + len(result.answered), num_bad + len(result.quarantined)
            done += result.unit.stop - result.unit.start
            progress(done, total)
    if not num_bad:
        bad_path.unlink()
    return Generated(output, num_rows, num_bad, bad_path if num_bad else None)


class _Worker:
    """An actor's engine. A user's mistake comes back as a value: raised, Ray would print its whole trace."""

    def __init__(self, job: Job) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._job = job
        self._failed: FtrayError | None = None
        try:
            self._tokeniser = tokeniser(job.base)
            self._engine = job.engine.build(job.base)
            if job.delta is not None:
                self._engine.load_delta(_DELTA, job.delta)
        except FtrayError as error:
            self._failed = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        results = [pickle.dumps(self._one(pickle.loads(unit))) for unit in batch["unit"].to_pylist()]
        return pa.table({"result": pa.array(results, pa.large_binary())})

    def _one(self, unit: Unit) -> UnitResult | FtrayError:
        if self._failed:
            return self._failed
        delta = None if self._job.delta is None else _DELTA
        try:
            return generate_unit(self._engine, self._tokeniser, unit, delta, self._job.sampling)
        except FtrayError as error:
            return error


def _run(job: Job, units: list[Unit], num_workers: int, num_gpus: float) -> Iterator[UnitResult]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    items = [{"unit": pickle.dumps(unit)} for unit in units]
    mapped = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        fn_constructor_args=(job,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(items))),
        num_cpus=1,
        num_gpus=num_gpus or None,
    )
    for row in mapped.iter_rows():
        result: UnitResult | FtrayError = pickle.loads(row["result"])
        if isinstance(result, FtrayError):
            raise result
        yield result


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    # A row may hold half a surrogate pair in a field that was not asked about; only an escape can spell it.
    return (text if text.isascii() or _encodes(text) else json.dumps(row)) + "\n"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
