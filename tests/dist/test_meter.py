"""Floating-point operations are those of the whole model, whatever part of it a rank holds."""

from pathlib import Path

import pytest

from ftray.config.recipe import Recipe
from ftray.testing.ranks import on_ranks
from ftray.train.io import LocalIO
from ftray.train.meter import Flops
from ftray.train.worker import begin
from tests.recipes import MakeRecipe


def counted(recipes: list[Recipe]) -> list[tuple[float, float]]:
    """Operations a token and a target of each recipe's model, once its strategy has spread it."""
    found = []
    for recipe in recipes:
        run = begin(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), None)
        flops = Flops(run.engine.policy.model)
        found.append((flops.per_token, flops.per_target))
        run.checkpoints.close()
        run.io.close()
    return found


@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_every_strategy_counts_the_same(make_recipe: MakeRecipe, adapt: str) -> None:
    strategies = [
        {"type": "ddp", "num_workers": 2},
        {"type": "fsdp", "num_workers": 2},
        *({"type": "deepspeed", "num_workers": 2, "zero_stage": stage} for stage in (1, 2, 3)),
    ]
    recipes = [
        make_recipe(f"run-{number}", strategy=strategy, adapt=adapt)
        for number, strategy in enumerate(strategies)
    ]
    (alone,) = counted([make_recipe("alone", adapt=adapt)])
    assert min(alone) > 0
    for found in on_ranks(2, counted, recipes):
        assert found == [alone] * len(recipes)
