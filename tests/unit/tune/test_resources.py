"""What a trial claims of the cluster."""

from typing import Any

import pytest
import ray

from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import parse
from ftray.tune.as_searched import segment_recipe
from ftray.tune.ray_claims import gpus, resources
from tests.recipes import MakeRecipe


def test_a_segment_claims_what_the_search_says_and_a_group_leaves_it_to_its_workers(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe(strategy={"type": "ddp", "num_workers": 2})
    settings = {"name": "s", "recipe": "r", "space": {"optim.learning_rate": {"uniform": [0, 1]}}}

    def claimed(**changes: Any) -> dict[str, float]:
        config = parse(TuneConfig, settings | changes)
        return resources(config, parse(Recipe, segment_recipe(config, recipe)))

    assert claimed() == {"cpu": 1.0, "gpu": 0.0}
    assert claimed(gpus_per_trial=0.5, cpus_per_trial=2.0) == {"cpu": 2.0, "gpu": 0.5}
    assert claimed(gpus_per_trial=1.0, spread=True) == {"cpu": 0.01, "gpu": 0.0}
    assert claimed(resources_per_trial={"disk": 1.0}) == {"cpu": 1.0, "gpu": 0.0, "disk": 1.0}
    with pytest.raises(ConfigError, match="gpus_per_trial"):
        claimed(gpus_per_trial=-1.0)
    with pytest.raises(ConfigError, match="GPU has a field of its own: `gpus_per_trial`"):
        claimed(resources_per_trial={"GPU": 1.0})
    with pytest.raises(ConfigError, match="resources_per_trial: disk: 0 is refused"):
        claimed(resources_per_trial={"disk": 0.0})


@pytest.mark.parametrize(("in_cluster", "of_group"), [(3.0, 3.0), (1.0, 0.0)])
def test_the_gpus_of_a_group_are_those_of_its_workers(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, in_cluster: float, of_group: float
) -> None:
    """A worker claims one where the cluster has as many as the least workers."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": in_cluster})
    recipe = make_recipe(strategy={"type": "ddp", "num_workers": [2, 3]})
    settings = {"name": "s", "recipe": "r", "space": {"optim.learning_rate": {"uniform": [0, 1]}}}
    for spread, expected in ((True, of_group), (False, 0.5)):
        config = parse(TuneConfig, settings | {"gpus_per_trial": 0.5, "spread": spread})
        assert gpus(config, parse(Recipe, segment_recipe(config, recipe))) == expected
