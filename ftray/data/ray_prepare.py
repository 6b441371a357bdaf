"""Preparation through Ray Data: byte ranges of the sources are mapped to shards by tasks on the cluster.

The same function does the work as in `prepare_local`, so the shards are equal byte by byte. Sources and
`cache_dir` must be on storage that every node sees.
"""

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import ray
import ray.data

from ftray.config.recipe import DataConfig
from ftray.core.errors import ClusterError, FtrayError
from ftray.core.types import Progress, no_progress
from ftray.data.prepare import Split, prepare_with
from ftray.data.store import Folder
from ftray.data.work import Outcome, Task

# Ray Data's plan holds one entry per block; a corpus of more units puts several in a block.
_MAX_BLOCKS = 2000
# The second one warns that progress bars are off, as they were told to be.
_LOG_LEVELS = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}


def prepare(
    data: DataConfig, tokenizer_folder: str, split: Split = "train", progress: Progress = no_progress
) -> Folder:
    """Prepare one split on the Ray cluster this process is connected to; see `prepare_local`.

    Raises:
        ClusterError: if there is no connection to a cluster.
        DataError: as `prepare_local`.
    """
    if not ray.is_initialized():
        raise ClusterError("not connected to Ray; open a session first, or prepare in this process")
    return prepare_with(run_on_ray, data, tokenizer_folder, split, progress)


def run_on_ray(
    work: Callable[[Task], Outcome], tasks: Sequence[Task], *, cpus_per_task: float = 1.0
) -> Iterator[Outcome]:
    """The `Runner` of a cluster; a task that shares its CPU with training workers claims a part of it."""
    if not tasks:
        return

    def map_tasks(batch: pa.Table) -> pa.Table:
        # A task has one CPU; the tokenizer's own threads would take those of other tasks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        results = [pickle.dumps(_attempt(work, pickle.loads(task))) for task in batch["task"].to_pylist()]
        return pa.table({"result": pa.array(results, pa.large_binary())})

    # The caller shows progress in source bytes; Ray Data's own bars and plan would be printed over it.
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name, level in _LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    items = [{"task": pickle.dumps(task)} for task in tasks]
    source = ray.data.from_items(items, override_num_blocks=min(len(items), _MAX_BLOCKS))
    mapped = source.map_batches(
        map_tasks, batch_size=1, batch_format="pyarrow", zero_copy_batch=True, num_cpus=cpus_per_task
    )
    for row in mapped.iter_rows():
        result: Outcome | FtrayError = pickle.loads(row["result"])
        if isinstance(result, FtrayError):
            raise result
        yield result


def _attempt(work: Callable[[Task], Outcome], task: Task) -> Outcome | FtrayError:
    """A user's mistake comes back as a value: raised in a task, Ray would print its whole trace."""
    try:
        return work(task)
    except FtrayError as error:
        return error
