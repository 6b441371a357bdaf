"""A run inside a Ray Train worker: shards prepared by the driver, checkpoints told to Ray."""

from pathlib import Path
from typing import Any

import ray.train

from ftray.config.recipe import Recipe
from ftray.data.store import Folder
from ftray.train.io import LocalIO, Record


class RayIO(LocalIO):
    """`LocalIO` on a folder all workers share.

    Step metrics go to the run folder directly: `ray.train.report` blocks for about two seconds a call, so Ray
    hears of a run at its checkpoints only.

    Args:
        run_dir: the run's folder, on storage all nodes see.
        shards: folders of the prepared training and validation shards.
    """

    def __init__(self, run_dir: Path, shards: tuple[Folder, Folder | None]) -> None:
        super().__init__(run_dir)
        self._shards = shards

    def prepare(self, recipe: Recipe) -> tuple[Folder, Folder | None]:
        """What the driver prepared with Ray Data."""
        return self._shards

    def committed(self, record: Record) -> None:
        """Report the metrics; the checkpoint itself is our own transaction and needs no copy by Ray."""
        metrics: dict[str, Any] = {key: value for key, value in record.items() if value is not None}
        ray.train.report(metrics)
