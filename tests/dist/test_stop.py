"""One rank alone is told to end: all of them end after the same step, with one checkpoint of it."""

import os
import signal
from pathlib import Path

from ftray.config.recipe import Recipe
from ftray.core.errors import RunStopped
from ftray.testing.ranks import on_ranks
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe


class Noticed(LocalIO):
    """Rank 1 sends itself SIGTERM in its third step."""

    def start(self, recipe: Recipe, rank: int) -> None:
        super().start(recipe, rank)
        self.at = 2 if rank == 1 else -1

    def beat(self, step: int, phase: str = "step") -> None:
        super().beat(step, phase)
        if step == self.at and phase == "step":
            self.at = -1
            os.kill(os.getpid(), signal.SIGTERM)


def until_told(whole: Recipe, recipe: Recipe) -> tuple[str, int | None, int]:
    """After a run nobody disturbs: what each rank says when it is stopped, and where the resumed run ends."""
    train(whole, LocalIO(Path(whole.output_dir) / whole.name))
    folder = Path(recipe.output_dir) / recipe.name
    try:
        train(recipe, Noticed(folder))
    except RunStopped as stopped:
        said, signum = str(stopped), stopped.signum
    return said, signum, train(recipe, LocalIO(folder)).step


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_records(folder / "metrics.jsonl") if "grad_norm" in record]


def test_all_ranks_end_together(make_recipe: MakeRecipe) -> None:
    ddp = {"type": "ddp", "num_workers": 2}
    recipe, whole = make_recipe("told", strategy=ddp), make_recipe("whole", strategy=ddp)
    one, two = on_ranks(2, until_told, whole, recipe)
    assert "stopped after step 3 (another rank was asked to end)" in one[0] and one[1] is None
    assert "stopped after step 3 (SIGTERM)" in two[0] and two[1] == signal.SIGTERM
    assert one[2] == two[2] == 6
    runs = Path(recipe.output_dir)
    steps = [r["step"] for r in read_records(runs / "told" / "metrics.jsonl") if "grad_norm" in r]
    assert steps == [1, 2, 3, 4, 5, 6], "no step lost, none twice"
    assert losses(runs / "told") == losses(runs / "whole"), "the same bits at the same world size"
