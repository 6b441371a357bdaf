"""Where metrics go. JSON lines and TensorBoard are always written; others by `tracking:` in the recipe."""

from pathlib import Path
from typing import Any, Protocol

from ftray.config.recipe import Recipe
from ftray.train.track.jsonl import Jsonl
from ftray.train.track.tensorboard import TensorBoard


class Sink(Protocol):
    """One open place for metrics."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one record; `step` is its position, numbers are its metrics."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class Tracker(Protocol):
    """One kind of place for metrics: one file and one line in the catalog."""

    def open(self, recipe: Recipe, run_dir: Path, from_step: int) -> Sink:
        """Open it for a run that goes on after `from_step`."""
        ...


class Sinks:
    """Every tracker of a run, open."""

    def __init__(self, recipe: Recipe, run_dir: Path, from_step: int) -> None:
        always: list[Tracker] = [Jsonl(), TensorBoard()]
        named = [tracker for tracker in recipe.tracking if tracker not in always]
        self._sinks = [tracker.open(recipe, run_dir, from_step) for tracker in (*always, *named)]

    def log(self, record: dict[str, Any]) -> None:
        """To all of them."""
        for sink in self._sinks:
            sink.log(record)

    def close(self) -> None:
        """Close all of them."""
        for sink in self._sinks:
            sink.close()
