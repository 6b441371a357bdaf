import math

import pytest

from ftray.config.constraint import Constraint
from ftray.core.errors import ConfigError
from ftray.core.spec import dump, parse
from ftray.tune.distribution import Uniform, parse_distribution
from ftray.tune.space import Space, apply, is_structural, unit

SPACE = {
    "optim.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "optim.weight_decay": {"uniform": [0.0, 0.1]},
    "train.global_batch_size": {"choice": [4, 8, 16]},
    "lr_scheduler.warmup_steps": {"int": [0, 10]},
    "adapt.r": {"choice": [2, 4, 8]},
}


def test_numbers_depend_on_their_key_alone_and_fill_the_unit_interval():
    numbers = [unit(7, "purpose", index) for index in range(4000)]
    assert numbers == [unit(7, "purpose", index) for index in range(4000)]
    assert numbers != [unit(8, "purpose", index) for index in range(4000)]
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02


def test_samples_lie_within_bounds_and_cover_the_range():
    space = Space(SPACE)
    configs = [space.sample(3, member) for member in range(64)]
    rates = [config["optim.learning_rate"] for config in configs]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    # Log-uniform: each half decade gets about a quarter of the members.
    quarters = [
        sum(1 for rate in rates if int((math.log10(rate) + 4) * 2) == quarter) for quarter in range(4)
    ]
    assert min(quarters) >= 10
    assert {config["adapt.r"] for config in configs} == {2, 4, 8}
    warmups = {config["lr_scheduler.warmup_steps"] for config in configs}
    assert warmups == set(range(11)) and all(isinstance(value, int) for value in warmups)


def test_four_members_already_differ_in_every_path():
    configs = [Space(SPACE).sample(0, member) for member in range(4)]
    rates = sorted(math.log10(config["optim.learning_rate"]) for config in configs)
    assert rates[-1] - rates[0] > 1.0
    assert len({config["adapt.r"] for config in configs}) >= 2


def test_a_perturbation_changes_mutable_paths_within_bounds_and_no_structural_one():
    space = Space(SPACE)
    for key in range(200):
        config = space.sample(0, key)
        moved = space.perturb(config, [0.8, 1.25], 0.2, "key", key)
        assert moved["adapt.r"] == config["adapt.r"]
        assert 1e-4 <= moved["optim.learning_rate"] <= 1e-2
        assert moved["train.global_batch_size"] in (4, 8, 16)
        assert moved == space.perturb(config, [0.8, 1.25], 0.2, "key", key)


def test_a_perturbation_at_a_bound_turns_back_into_the_range():
    space = Space({"optim.learning_rate": {"loguniform": [1e-4, 1e-2]}, "train.n": {"choice": [4, 8]}})
    for key in range(20):
        for edge in (1e-4, 1e-2):
            moved = space.perturb({"optim.learning_rate": edge, "train.n": 8}, [0.8, 1.25], 0.0, key)
            assert moved["optim.learning_rate"] in (pytest.approx(1.25e-4), pytest.approx(0.8e-2))
            assert moved["train.n"] == 4


def test_quantised_values_stay_on_the_grid():
    distribution = parse_distribution({"quniform": [0.1, 0.9, 0.2]}, "space.x")
    values = {distribution.at(position / 100) for position in range(101)}
    assert values == {0.1, 0.3, 0.5, 0.7, 0.9}
    assert distribution.moved(0.3, 1.25) == 0.5 and distribution.moved(0.9, 1.25) == 0.9
    assert Uniform(low=1, high=9, step=1, integer=True).moved(2, 1.25) == 3


def test_structural_paths():
    for path in ("adapt.r", "model.dtype", "optim", "optim.type", "objective.beta", "seed"):
        assert is_structural(path), path
    for path in ("optim.learning_rate", "train.max_grad_norm", "lr_scheduler.warmup_steps"):
        assert not is_structural(path), path


@pytest.mark.parametrize(
    ("distribution", "words"),
    [
        ({"loguniformm": [1, 2]}, ["loguniformm", "did you mean `loguniform`"]),
        ({"uniform": [2, 1]}, ["[2, 1]", "low < high"]),
        ({"uniform": [1, 1]}, ["empty"]),
        ({"uniform": [1]}, ["[1]", "[low, high]"]),
        ({"uniform": "wide"}, ["'wide'"]),
        ({"loguniform": [0, 1]}, ["above 0"]),
        ({"quniform": [0, 1, 2]}, ["step 2"]),
        ({"choice": []}, ["values", "[]"]),
        ({"choice": [1], "uniform": [0, 1]}, ["not one distribution"]),
        ({}, ["not one distribution"]),
    ],
)
def test_a_wrong_distribution_is_one_line_that_names_the_path(distribution, words):
    with pytest.raises(ConfigError) as caught:
        Space({"optim.learning_rate": distribution})
    message = str(caught.value)
    assert "\n" not in message and message.startswith("space.optim.learning_rate")
    assert all(word in message for word in words), message


def mixed(make_recipe, corpus):
    train = [str(corpus["train"]), str(corpus["validation"])]
    return make_recipe(data__train=train, data__mixture={train[0]: 1, train[1]: 3}), train


def test_the_weight_of_one_source_is_a_number_to_search(make_recipe, corpus):
    recipe, sources = mixed(make_recipe, corpus)
    path = f"data.mixture.{sources[1]}.weight"
    rule = parse(Constraint, {"path": path, "at_least": f"data.mixture.{sources[0]}.weight"})
    space = Space({path: {"uniform": [0.5, 4.0]}}, [rule], dump(recipe))
    space.check(recipe)
    drawn = [space.sample(0, member) for member in range(8)]
    assert len({config[path] for config in drawn}) == 8 and all(1 <= config[path] <= 4 for config in drawn)
    mixture = apply(recipe, drawn[0]).data.mixture
    assert [entry.source for entry in mixture] == sources
    assert [entry.weight for entry in mixture] == [1.0, drawn[0][path]]
    assert is_structural(path)


@pytest.mark.parametrize(
    ("path", "values", "words"),
    [
        ("data.mixture.wiki.jsonl.weight", [0.5, 2.0], ["the recipe has no such field", "did you mean"]),
        ("data.mixture.weights", [0.5, 2.0], ["the recipe has no such field", "did you mean"]),
        ("data.mixture.{0}.weight", [0.0, 2.0], ["0.0 is refused", "greater than 0"]),
        ("data.mixture.{0}", [0.5, 2.0], ["mixture"]),
    ],
)
def test_a_wrong_weight_is_one_line(make_recipe, corpus, path, values, words):
    recipe, sources = mixed(make_recipe, corpus)
    path = path.format(sources[0])
    with pytest.raises(ConfigError) as caught:
        Space({path: {"uniform": values}}).check(recipe)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"space.{path}")
    assert all(word in message for word in words), message


def test_a_range_is_tried_between_its_bounds_too(make_recipe):
    with pytest.raises(
        ConfigError, match=r"space\.adapt\.r: adapt\.r: 3\.66 is refused; input should be a valid integer"
    ):
        Space({"adapt.r": {"uniform": [1, 8]}}).check(make_recipe())
    Space({"adapt.r": {"int": [1, 8]}}).check(make_recipe())


def test_of_a_piece_not_the_type_alone_is_searched(make_recipe):
    remedy = r"space\.adapt\.type: adapt\.\w+: unknown key; known here: none.*; search `adapt` as a whole"
    with pytest.raises(ConfigError, match=remedy):
        Space({"adapt.type": {"choice": ["lora", "full"]}}).check(make_recipe())
    Space({"adapt": {"choice": [{"type": "lora", "r": 2}, "full"]}}).check(make_recipe())


def test_paths_the_search_sets_itself_are_refused():
    for path in ("train.max_steps", "name", "strategy", "strategy.num_workers", "train"):
        with pytest.raises(ConfigError, match=f"space.{path}: the search sets"):
            Space({path: {"choice": [{"max_steps": 7}]}})
