"""A group that grows and shrinks between its checkpoints trains the rows, and follows the curve, of one process."""

import math
from pathlib import Path
from typing import Any

import pytest

from ftray.config.recipe import Recipe
from ftray.data.order import PADDING
from ftray.testing.ranks import in_group, on_ranks
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.elastic import recorded
from tests.recipes import MakeRecipe

BATCH, MICRO = 12, 2
LIVES = [(2, 2), (3, 4), (1, 5), (3, 8)]
"""Ranks, and the step at which they end."""


def lives(recipe: Recipe) -> None:
    """Each life in a new group of the first so many of these processes."""
    folder = Path(recipe.output_dir)
    for number, (size, stop) in enumerate(LIVES):
        in_group(size, folder / f"meet-{number}", live, recipe, stop)


def live(recipe: Recipe, stop: int) -> None:
    train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), stop_at=stop)


def losses(folder: Path) -> dict[int, float]:
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "grad_norm" in record}


def test_ranks_come_and_go(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Two ranks, three, one, three; each time another number of micro batches."""

    def recipe(name: str, path: str, **changes: Any) -> Recipe:
        return make_recipe(
            name,
            train__max_steps=8,
            train__global_batch_size=BATCH,
            train__per_device_train_batch_size=MICRO,
            data__validation=[],
            optim__learning_rate=1e-3,  # a larger one makes more of rounding than 1e-5 within eight steps
            objective={"type": "tests.elastic:Recording", "path": str(tmp_path / path)},
            **changes,
        )

    whole = recipe("whole", "ids")
    train(whole, LocalIO(tmp_path / "whole"))
    reference = [row for step in recorded(tmp_path / "ids.0", 6) for row in step]
    elastic = {"strategy": {"type": "ddp", "num_workers": [1, 4]}}
    parts = recipe("parts", "parts", **elastic)
    Path(parts.output_dir).mkdir()
    on_ranks(3, lives, parts)
    files = [(tmp_path / f"parts.{rank}").read_text().splitlines() for rank in range(3)]
    seen: list[int] = []
    begun = 0
    for size, stop in LIVES:
        micro_batches = math.ceil(math.ceil(BATCH / size) / MICRO)
        for _ in range(stop - begun):
            for rank in range(size):
                lines, files[rank] = files[rank][:micro_batches], files[rank][micro_batches:]
                seen += [int(row) for line in lines for row in line.split()]
        begun = stop
    assert not any(files)
    assert [row for row in seen if row != PADDING] == reference, "0 missing, 0 repeated, in order"
    runs = Path(whole.output_dir)
    assert losses(runs / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
