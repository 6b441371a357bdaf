"""Preparation through Ray Data: byte ranges of the sources are mapped to shards by tasks on the cluster.

The same function does the work as in `prepare_local`, so the shards are equal byte by byte. Sources and
`cache_dir` must be on storage that every node sees.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import ray
import ray.data

from ftray.config.recipe import DataConfig
from ftray.core.errors import ClusterError, DataError, FtrayError
from ftray.core.types import Progress, no_progress
from ftray.data.prepare import Split, prepare_with
from ftray.data.work import Outcome, Task

# Ray Data's plan holds one entry per block; a corpus of more units puts several in a block.
_MAX_BLOCKS = 2000


def prepare(
    data: DataConfig, tokenizer_folder: str, split: Split = "train", progress: Progress = no_progress
) -> Path:
    """Prepare one split on the Ray cluster this process is connected to; see `prepare_local`.

    Raises:
        ClusterError: if there is no connection to a cluster.
        DataError: as `prepare_local`.
    """
    if not ray.is_initialized():
        raise ClusterError("not connected to Ray; open a session first, or prepare in this process")
    return prepare_with(_run_on_ray, data, tokenizer_folder, split, progress)


def _run_on_ray(work: Callable[[Task], Outcome], tasks: Sequence[Task]) -> Iterator[Outcome]:
    if not tasks:
        return

    def map_tasks(batch: pa.Table) -> pa.Table:
        # A task has one CPU; the tokenizer's own threads would take those of other tasks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        outcomes = [pickle.dumps(work(pickle.loads(task))) for task in batch["task"].to_pylist()]
        return pa.table({"outcome": pa.array(outcomes, pa.large_binary())})

    items = [{"task": pickle.dumps(task)} for task in tasks]
    source = ray.data.from_items(items, override_num_blocks=min(len(items), _MAX_BLOCKS))
    mapped = source.map_batches(map_tasks, batch_size=1, batch_format="pyarrow", zero_copy_batch=True)
    try:
        for row in mapped.iter_rows():
            yield pickle.loads(row["outcome"])
    except ray.exceptions.RayError as error:
        raise _cause(error) from error


def _cause(error: BaseException) -> BaseException:
    """The user's mistake inside Ray's wrapping, if there is one."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, FtrayError):
            return DataError(str(inner))
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
