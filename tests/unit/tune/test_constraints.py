import pytest

from ftray.config.constraint import Constraint
from ftray.core.errors import ConfigError
from ftray.core.spec import parse
from ftray.tune.space import Space

SPACE = {"adapt.r": {"int": [1, 64]}, "adapt.lora_alpha": {"int": [1, 64]}}
RECIPE = {"train": {"global_batch_size": 8}, "adapt": {"type": "lora", "r": 8, "lora_alpha": 16}}


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ({"path": "a", "less_than": 3}, False),
        ({"path": "a", "at_most": 3}, True),
        ({"path": "a", "at_least": "b"}, False),
        ({"path": "b", "greater_than": "a", "times": 2}, True),
        ({"path": "b", "greater_than": "a", "times": 3}, False),
        ({"sum": ["a", "b"], "at_most": 10}, True),
        ({"product": ["a", "b"], "less_than": 21}, False),
        ({"path": "b", "at_least": 5, "at_most": 6}, False),
    ],
)
def test_comparisons(rule, holds):
    assert parse(Constraint, rule).holds({"a": 3, "b": 7}.get) is holds


def test_draws_and_perturbations_keep_to_constraints():
    rules = [
        parse(Constraint, {"path": "adapt.lora_alpha", "at_least": "adapt.r"}),
        parse(Constraint, {"product": ["adapt.r", "train.global_batch_size"], "at_most": 256}),
    ]
    space = Space(SPACE, rules, RECIPE)
    drawn = [space.sample(0, member) for member in range(40)]
    assert all(c["adapt.r"] <= min(32, c["adapt.lora_alpha"]) for c in drawn)
    assert len({tuple(c.values()) for c in drawn}) > 30
    free = Space(SPACE, [], RECIPE)
    assert any(c["adapt.r"] > 32 for c in (free.sample(0, member) for member in range(40)))

    rates = {"optim.a": {"uniform": [0.0, 1.0]}, "optim.b": {"uniform": [0.0, 1.0]}}
    ordered = Space(rates, [parse(Constraint, {"path": "optim.a", "less_than": "optim.b"})])
    for member in range(30):
        moved = ordered.perturb(ordered.sample(1, member), [0.5, 2.0], 0.3, "key", member)
        assert moved["optim.a"] < moved["optim.b"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"less_than": 3}, "one of `path`, `sum` and `product`"),
        ({"path": "adapt.r", "sum": ["adapt.r"], "at_most": 3}, "one of `path`, `sum` and `product`"),
        ({"path": "adapt.r"}, "adapt.r: compared with nothing"),
        ({"path": "adapt.r", "max_of": 3}, "max_of: unknown key"),
    ],
)
def test_a_wrong_constraint_is_one_line(rule, words):
    with pytest.raises(ConfigError) as caught:
        parse(Constraint, rule)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_number_cannot_be_compared():
    space = Space(SPACE, [parse(Constraint, {"path": "adapt.type", "at_most": 3})], RECIPE)
    with pytest.raises(ConfigError, match=r"adapt\.type is 'lora', which cannot be compared"):
        space.sample(0, 0)
