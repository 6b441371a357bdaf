"""What a trainer that is not ours is given."""

import functools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError
from ftray.model.folder import resolve_folder
from ftray.model.tokenizer import load_tokenizer
from ftray.train.io import IO
from ftray.train.opaque.rows import RawRow, RawRows, read_rows

FOLDER = "trainer"
"""In the run folder: what a trainer that is not ours writes."""


class Context:
    """Rows, folders and a log for one worker of a run.

    Args:
        recipe: the run.
        io: its surroundings.
    """

    def __init__(self, recipe: Recipe, io: IO) -> None:
        self.recipe = recipe
        self.rank: int = recipe.strategy.dp_rank
        """This worker's number."""
        self.world_size: int = recipe.strategy.dp_size
        """How many workers there are."""
        self.work_dir = io.run_dir / FOLDER
        """For the trainer's own files and checkpoints; all workers share it, and a restarted run finds it again."""
        self.output_dir = self.work_dir / "output"
        """Where rank 0 leaves the adapter (PEFT) or the model (`save_pretrained`)."""
        self.columns: Collection[str] = ()
        """Columns of columnar files to read besides those that known shapes of rows have."""
        self.last: dict[str, Any] = {}
        """The newest metrics that were logged."""
        self._io, self._read = io, functools.cache(self._rows)

    @property
    def model_dir(self) -> Path:
        """Folder of the base model."""
        return resolve_folder(self.recipe.model.model_name_or_path)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return load_tokenizer(self.recipe.model.tokenizer)

    def raw(self, split: str = "train") -> RawRows:
        """All rows of a split in our order, with what became of the others."""
        return self._read(split)

    def dataset(self, split: str = "train") -> Any:
        """All rows of a split in our order as a `datasets.Dataset`; a trainer that shuffles is its own master."""
        try:
            import datasets
        except ImportError:
            raise ConfigError(
                "trainer: rows are handed as a `datasets.Dataset`; `pip install datasets`"
            ) from None
        return datasets.Dataset.from_list(self.raw(split).rows)

    def rows(self, split: str = "train") -> Iterator[RawRow]:
        """This worker's share of a split's rows: every `world_size`-th of our order."""
        yield from self.raw(split).rows[self.rank :: self.world_size]

    @property
    def counts(self) -> dict[str, Any]:
        """What became of the training rows."""
        found = self.raw("train")
        bad = sum(found.quarantined.values())
        return {
            "rows": len(found.rows) + bad,
            "documents": len(found.rows),
            "filtered": {},
            "quarantined": found.quarantined,
            "tokens": 0,
            "targets": 0,
        }

    def log(self, step: int, **metrics: Any) -> None:
        """Write metrics of an optimiser step to `metrics.jsonl` and the run's trackers; rank 0 only writes."""
        total = self.recipe.train.max_steps
        progress = {"progress": min(1.0, step / total)} if total else {}
        self.last = {**self.last, "step": step, **metrics}
        self._io.log({"step": step, **metrics, **progress})

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint that a transformers `Trainer` left in `work_dir` in an earlier life of the run."""
        found = [
            path for path in self.work_dir.glob("checkpoint-*") if (path / "trainer_state.json").is_file()
        ]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    @property
    def resume_step(self) -> int:
        """Optimiser steps behind `checkpoint`."""
        found = self.checkpoint
        return (
            int(json.loads((found / "trainer_state.json").read_text("utf-8"))["global_step"]) if found else 0
        )

    def _rows(self, split: str) -> RawRows:
        return read_rows(self.recipe.data, split, self.recipe.seed, self.columns)
