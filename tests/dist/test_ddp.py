"""Two and three ranks train what one process trains."""

from pathlib import Path

import pytest

from ftray.config.recipe import Recipe
from ftray.testing.ranks import on_ranks
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from ftray.train.run import Result
from ftray.train.worker import train
from tests.recipes import MakeRecipe


def train_here(recipe: Recipe) -> Result:
    return train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name))


def losses(recipe: Recipe) -> list[float]:
    records = read_records(Path(recipe.output_dir) / recipe.name / "metrics.jsonl")
    return [record["loss"] for record in records if "grad_norm" in record]


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_two_ranks_equal_one(make_recipe: MakeRecipe, adapt: str) -> None:
    one = make_recipe("one", adapt=adapt)
    two = make_recipe("two", adapt=adapt, strategy={"type": "ddp", "num_workers": 2})
    alone = train_here(one)
    results = on_ranks(2, train_here, two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for result in results:
        assert result.metrics["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], rel=1e-4)
        assert (result.step, result.tokens) == (alone.step, alone.tokens)


def test_resume_at_another_world_size(make_recipe: MakeRecipe) -> None:
    """2 ranks, then 1, then 3 (a batch of 4 does not divide): one curve."""
    whole = make_recipe("whole", train__max_steps=9)
    train_here(whole)
    changes = {"train__save_steps": 3, "train__max_steps": 9}
    for world, stop in ((2, 3), (1, 6), (3, 9)):
        strategy = {"type": "ddp", "num_workers": world} if world > 1 else "single"
        recipe = make_recipe("parts", strategy=strategy, **changes)
        if world == 1:
            train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), stop_at=stop)
        else:
            on_ranks(world, train_until, recipe, stop)
    assert losses(recipe) == pytest.approx(losses(whole), rel=1e-5)


def train_until(recipe: Recipe, stop: int) -> Result:
    return train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), stop_at=stop)
