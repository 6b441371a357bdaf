"""Deletes the checkpoints of a search that nothing refers to; metrics and results stay for the report."""

import shutil
from pathlib import Path

from ftray.tune.engine import Engine
from ftray.tune.segment import Job


class Collector:
    """Goes through the folders of all segments, also of those that failed or that an earlier driver left.

    Args:
        engine: says what may go.
        job: says where it is.
    """

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._segments = engine, Path(job.folder) / "segments"
        self._gone: set[str] = set()

    def collect(self) -> None:
        """Delete what may go by now and has not gone yet."""
        names = {path.name for path in self._segments.glob("*")} - self._gone
        for name in self._engine.disposable(sorted(names)):
            shutil.rmtree(self._segments / name / "checkpoints", ignore_errors=True)
            shutil.rmtree(self._segments / name / "delta", ignore_errors=True)
            self._gone.add(name)
