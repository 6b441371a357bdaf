"""Specs: strict parsing with one-line errors, lossless dumping, pickling."""

import pickle
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from ftray import catalog
from ftray.config.recipe import DataConfig, Recipe
from ftray.core.errors import ConfigError, FtrayError
from ftray.core.paths import set_path
from ftray.core.spec import Piece, dump, parse, replace, spec


@spec
class Inner:
    """A part."""

    rate: float = Field(default=0.1, gt=0)
    """Its rate."""
    names: list[str] = Field(default_factory=list)
    """Its names."""


@spec
class Outer:
    """A whole."""

    inner: Inner
    """The part."""
    count: int = 1
    """How many."""
    limit: int | None = None
    """How many at most."""
    inners: list[Inner] = Field(default_factory=list)
    """More parts."""


RECIPE: dict[str, Any] = {
    "name": "r",
    "model": {"model_name_or_path": "base"},
    "data": {"train": "a.jsonl", "transforms": ["clean", {"type": "length"}]},
    "adapt": {"type": "lora", "r": 8},
    "objective": "sft",
    "optim": {"type": "adamw", "learning_rate": 4e-3},
    "lr_scheduler": "constant",
    "strategy": "single",
    "train": {"max_steps": 3},
}


def test_defaults_are_filled_and_values_checked() -> None:
    outer = parse(Outer, {"inner": {"rate": 1}})
    assert outer == Outer(inner=Inner(rate=1.0))
    with pytest.raises(AttributeError):
        outer.count = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {}, "cuont": 2}, "f.yaml: cuont: unknown key; did you mean `count`?"),
        ({"inner": {"raet": 2}}, "f.yaml: inner.raet: unknown key; did you mean `rate`?"),
        ({"inner": {}, "inners": [{"zzz": 1}]}, "f.yaml: inners.0.zzz: unknown key; known here: rate, names"),
        ({}, "f.yaml: inner: missing; give it a value"),
        ({"inner": {"rate": 0}}, "f.yaml: inner.rate: 0 is refused; input should be greater than 0"),
        ({"inner": {"rate": "fast"}}, "f.yaml: inner.rate: 'fast' is refused;"),
        ({"inner": {}, "count": 1.5}, "f.yaml: count: 1.5 is refused;"),
        ({"inner": {"names": "a"}}, "f.yaml: inner.names: 'a' is refused;"),
        ({"inner": 3}, "f.yaml: inner: 3 is refused;"),
        ([1], "f.yaml: [1] is not a mapping of settings"),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_remedy(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(Outer, data, where="f.yaml")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("adapt", "loar", "did you mean `lora`?"),
        ("adapt", {"type": "lora", "rank": 8}, "adapt"),
        ("adapt", {"r": 8}, "`type` is missing"),
        ("adapt", 3, "3 is not a adapt"),
        ("adapt", "no.such.module:Thing", "cannot be imported"),
        ("data.transforms", ["claen"], "did you mean `clean`?"),
        ("train.max_steps", 0, "train.max_steps: 0 is refused"),
        ("train.max_step", 1, "did you mean `max_steps`?"),
        ("model.dtype", "float16", "model.dtype: 'float16' is refused"),
        ("name", "Bad Name", "name: 'Bad Name' is refused"),
        ("optim.learning_rate", "fast", "learning_rate"),
    ],
)
def test_a_recipe_names_what_is_wrong(path: str, value: Any, message: str) -> None:
    data = parse_dump(RECIPE)
    set_path(data, path, value)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("[", r"\[")) as raised:
        parse(Recipe, data, where="r.yaml")
    assert "\n" not in str(raised.value) and str(raised.value).startswith("r.yaml: ")


def parse_dump(data: dict[str, Any]) -> dict[str, Any]:
    """A deep copy by the way of a recipe, every default written out."""
    return dict(dump(parse(Recipe, data)))


def test_a_recipe_survives_dump_and_pickle() -> None:
    recipe = parse(Recipe, RECIPE)
    assert parse(Recipe, dump(recipe)) == recipe
    assert dump(parse(Recipe, dump(recipe))) == dump(recipe)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert dump(recipe)["adapt"]["type"] == "lora" and dump(recipe)["adapt"]["r"] == 8


def test_replace_checks_again() -> None:
    recipe = parse(Recipe, RECIPE)
    assert replace(recipe, "optim.learning_rate", 0.5).optim.learning_rate == 0.5
    assert recipe.optim.learning_rate == 4e-3
    with pytest.raises(ConfigError, match=r"optim\.learning_rate"):
        replace(recipe, "optim.learning_rate", -1)


@given(
    rate=st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False),
    names=st.lists(st.text(max_size=5), max_size=3),
    count=st.integers(-(2**60), 2**60),
    limit=st.none() | st.integers(-5, 5),
)
def test_any_spec_survives_dump(rate: float, names: list[str], count: int, limit: int | None) -> None:
    outer = Outer(inner=Inner(rate=rate, names=names), count=count, limit=limit, inners=[Inner(names=names)])
    assert parse(Outer, dump(outer)) == outer


def test_set_path_opens_a_name_into_a_mapping() -> None:
    data: dict[str, Any] = {"adapt": "lora", "n": 3}
    set_path(data, "adapt.r", 4)
    set_path(data, "new.deep.key", 1)
    assert data == {"adapt": {"type": "lora", "r": 4}, "n": 3, "new": {"deep": {"key": 1}}}
    with pytest.raises(ConfigError, match="`n` is 3, which has no fields"):
        set_path(data, "n.x", 1)


def test_a_ready_object_and_a_users_own_class_are_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_adapter_piece.py").write_text(
        "from ftray.core.spec import spec\n@spec\nclass Mine:\n    '''Mine.'''\n    k: int = 1\n    '''K.'''\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    @spec
    class Holder:
        adapt: Annotated[Any, Piece("adapt")]
        """What trains."""

    holder = parse(Holder, {"adapt": {"type": "own_adapter_piece:Mine", "k": 5}})
    assert holder.adapt.k == 5
    assert Holder(adapt=holder.adapt).adapt is holder.adapt
    assert dump(holder) == {"adapt": {"type": "own_adapter_piece:Mine", "k": 5}}
    assert parse(Holder, dump(holder)) == holder


def test_a_single_path_is_a_list_of_one() -> None:
    assert parse(DataConfig, {"train": "a.jsonl"}).train == ["a.jsonl"]


def test_every_catalog_line_resolves_to_a_spec_that_names_itself() -> None:
    import dataclasses

    for kind in catalog.METHODS:
        for name in catalog.names(kind):
            cls = catalog.resolve(kind, name)
            assert dataclasses.is_dataclass(cls), f"{kind} {name}"
            # A class may have several names, one of which is written.
            written = catalog.name_of(cls)
            assert written in catalog.names(kind) and catalog.resolve(kind, written) is cls
            assert cls.__doc__, f"{kind} {name} has no docstring"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean `adamw`"):
        catalog.resolve("optim", "adamv")
    with pytest.raises(FtrayError, match="known: "):
        catalog.resolve("optim", "zzzzzz")
    with pytest.raises(ConfigError, match="cannot be imported"):
        catalog.resolve("optim", "ftray.optim.adamw:Nothing")
