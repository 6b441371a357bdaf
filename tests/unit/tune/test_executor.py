"""What a population cannot search is told before anything is trained."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from ftray.core.errors import ConfigError
from ftray.testing.tiny import ARCHITECTURES
from ftray.train.population import Population
from ftray.tune.local import run_local
from tests.recipes import MakeRecipe
from tests.unit.tune.test_populations import search

LORA = {"type": "lora", "r": 2}


@pytest.mark.parametrize(
    ("words", "space", "executor"),
    [
        (
            "space.adapt: adapt.target_modules: members of a population share it, but one has",
            {"adapt": [LORA | {"target_modules": ["q_proj"]}, LORA | {"target_modules": ["v_proj"]}]},
            "population",
        ),
        ("space.adapt: adapt: `full` trains the base", {"adapt": [LORA, "full"]}, "population"),
        (
            "space.train.per_device_train_batch_size: rows_per_pass: 3 is less than",
            {"train.per_device_train_batch_size": [2, 4]},
            {"type": "population", "rows_per_pass": 3},
        ),
        (
            "rows_per_pass: 1 is less than",
            {"optim.learning_rate": [1e-3, 1e-2]},
            {"type": "population", "rows_per_pass": 1},
        ),
    ],
)
def test_no_value_of_a_space_may_part_the_members(
    make_recipe: MakeRecipe, tmp_path: Path, words: str, space: dict[str, list[Any]], executor: Any
) -> None:
    recipe = make_recipe(train__global_batch_size=4)
    choices = {path: {"choice": values} for path, values in space.items()}
    with pytest.raises(ConfigError) as caught:
        run_local(search(tmp_path, recipe, "refused", space=choices, executor=executor), recipe)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
    assert not (tmp_path / "refused" / "journal.jsonl").exists()


def test_the_base_is_let_go_of_with_the_search(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built once for all segments, and nothing of it is left when the search returns."""
    built = []
    keep = Population.__init__
    monkeypatch.setattr(
        Population, "__init__", lambda self, r: (built.append(weakref.ref(self)), keep(self, r))[1]
    )
    recipe = make_recipe(train__global_batch_size=2)
    run_local(search(tmp_path, recipe, "s", num_members=2, num_segments=2, segment_steps=1), recipe)
    gc.collect()
    assert len(built) == 1 and built[0]() is None
    segments = list((tmp_path / "s" / "segments").iterdir())
    assert len(segments) == 4
    assert not [folder for folder in segments if (folder / "loss.png").exists()], (
        "the report draws the curves"
    )


def test_a_seed_that_makes_the_base_is_no_member_s_own(
    make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path
) -> None:
    model = {"init": "config", "config": ARCHITECTURES["llama"] | {"vocab_size": 258}}
    random = make_recipe(model=model | {"tokenizer_name_or_path": str(tiny_base)})
    space = {"seed": {"int": [0, 3]}}
    with pytest.raises(
        ConfigError, match=r"^space.seed: seed: members of a population share it, .* 0 and .* 3"
    ):
        run_local(search(tmp_path, random, "refused", space=space), random)
    made = make_recipe()
    config = search(tmp_path, made, "kept", space=space)
    config.executor.check(config, made)  # of a base that is read, it is
