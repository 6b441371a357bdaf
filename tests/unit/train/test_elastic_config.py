"""`num_workers` as a number, or as the least and the most."""

from pathlib import Path
from typing import Any

import pytest

from ftray.config.load import load, write_resolved
from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError
from ftray.strategy.elastic import bounds
from tests.recipes import MakeRecipe


@pytest.mark.parametrize(("given", "expected"), [(3, (3, 3)), ([1, 4], (1, 4)), ([2, 2], (2, 2))])
def test_number_of_workers_is_kept_in_files(
    make_recipe: MakeRecipe, tmp_path: Path, given: Any, expected: tuple[int, int]
) -> None:
    recipe = make_recipe(strategy={"type": "ddp", "num_workers": given})
    assert bounds(recipe.strategy.num_workers) == expected
    write_resolved(recipe, tmp_path / "recipe.yaml")
    assert load(Recipe, str(tmp_path / "recipe.yaml"), []) == recipe


@pytest.mark.parametrize("given", [0, [4, 1], [0, 2], [1, 2, 3], "x", True, [1, 2.5]])
def test_a_number_that_is_none_is_refused(make_recipe: MakeRecipe, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_workers.*write `2`, or `\[1, 4\]`"):
        make_recipe(strategy={"type": "ddp", "num_workers": given})
