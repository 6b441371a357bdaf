"""YAML to specs: numbers, duplicates, variables, overrides, and the resolved tree that loads again."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ftray.config.load import apply_override, load, read_yaml, text_of, to_yaml, write_resolved
from ftray.config.recipe import Recipe
from ftray.config.serve import ServeConfig
from ftray.config.tune import TuneConfig
from ftray.core.errors import ConfigError

RECIPE = """
name: r
model: {model_name_or_path: base}
data: {train: a.jsonl}
adapt: lora
objective: sft
optim: {type: adamw, learning_rate: 4e-3}
lr_scheduler: constant
strategy: single
train: {max_steps: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("text", ["4e-3", "4E-3", "4.e-3", ".4e-2", "+4e-3", "1e5", "-2e+4", "0.004"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str) -> None:
    (tmp_path / "n.yaml").write_text(f"n: {text}\n")
    value = read_yaml(tmp_path / "n.yaml")["n"]
    assert isinstance(value, float) and value == float(text)


@pytest.mark.parametrize("text", ["e3", "1e", "4e-3x", "v1e5", "'4e-3'"])
def test_what_is_no_number_stays_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "n.yaml").write_text(f"n: {text}\n")
    assert read_yaml(tmp_path / "n.yaml")["n"] == text.strip("'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "`a` stands twice"),
        ("a:\n  b: 1\n  b: 2\n", "line 2 is not YAML: `b` stands twice"),
        ("a: [1, 2\n", "is not YAML"),
        ("a: !!python/object/apply:os.system ['touch pwned']\n", "is not YAML"),
        ("", "holds no settings"),
        ("- 1\n", "holds no settings"),
        ("name: ${FTRAY_NOT_SET_ANYWHERE}\n", "FTRAY_NOT_SET_ANYWHERE"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load(Recipe, path)
    assert str(raised.value).startswith(f"{path}:") and "\n" not in str(raised.value)


def test_missing_and_binary_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(ConfigError) as raised:
            read_yaml(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_variables_and_home_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAY_X", "here")
    monkeypatch.setenv("HOME", "/home/u")
    (tmp_path / "v.yaml").write_text("a: ${FTRAY_X}/b\nb: ['${FTRAY_NO:-default}']\nc: ~/x\nd: x~y\n")
    assert read_yaml(tmp_path / "v.yaml") == {"a": "here/b", "b": ["default"], "c": "/home/u/x", "d": "x~y"}


def test_overrides_win_and_are_typed(recipe: Path) -> None:
    loaded = load(
        Recipe,
        recipe,
        [
            "train.max_steps=7",
            "adapt.r=4",
            "optim.learning_rate=1e-4",
            "data.train=[x.jsonl, y.jsonl]",
            "name=a=b",
        ][:4],
    )
    assert (loaded.train.max_steps, loaded.adapt.r, loaded.optim.learning_rate) == (7, 4, 1e-4)
    assert loaded.data.train == ["x.jsonl", "y.jsonl"]
    assert load(Recipe, recipe, ["train.max_grad_norm=null"]).train.max_grad_norm is None
    assert load(Recipe, recipe, ["train.bf16=false"]).train.bf16 is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "not an override"),
        ("=3", "not an override"),
        ("train.max_steps=[1", "not YAML"),
        ("train.max_stepz=1", "did you mean `max_steps`?"),
        ("train.max_steps=many", "train.max_steps: 'many' is refused"),
        ("name.first=1", "name"),
    ],
)
def test_a_wrong_override_is_one_line(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load(Recipe, recipe, [override])
    assert "\n" not in str(raised.value)


def test_the_resolved_tree_loads_to_the_same(recipe: Path, tmp_path: Path) -> None:
    first = load(Recipe, recipe, ["adapt.r=3"])
    write_resolved(first, tmp_path / "resolved.yaml")
    again = load(Recipe, tmp_path / "resolved.yaml")
    assert again == first
    assert to_yaml(again) == (tmp_path / "resolved.yaml").read_text()


def test_other_trees_resolve_too(tmp_path: Path) -> None:
    tune = TuneConfig(name="t", recipe="r.yaml", space={"optim.learning_rate": {"loguniform": [1e-4, 1e-2]}})
    serve = ServeConfig(base="b", deltas=["x@3"], tenants=[{"name": "t", "key_sha256": "0" * 64}])
    for config in (tune, serve):
        write_resolved(config, tmp_path / "c.yaml")
        assert load(type(config), tmp_path / "c.yaml") == config


def test_a_wide_bind_needs_tenants() -> None:
    with pytest.raises(ValueError, match="tenants"):
        ServeConfig(base="b", host="0.0.0.0")


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(codec="utf-8", exclude_categories=["C"]))
)


@given(value=VALUES | st.lists(VALUES, max_size=3))
@example(value="0E0")
@example(value=["1e5", "-.5E+3"])
def test_any_value_survives_an_override(value: Any) -> None:
    if "$" in str(value) or "~" in str(value):  # these are expanded
        return
    data: dict[str, Any] = {}
    text = text_of(value, default_flow_style=True, width=10**6)
    apply_override(data, "a.b=" + text.removesuffix("...\n"))
    assert data == {"a": {"b": value}}


def test_a_variable_that_an_override_replaces_need_not_be_set(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("base: b\ntenants: [{name: a, key_sha256: '${FTRAY_TEST_UNSET}'}]\n")
    with pytest.raises(ConfigError, match="FTRAY_TEST_UNSET"):
        load(ServeConfig, tmp_path / "s.yaml")
    assert load(ServeConfig, tmp_path / "s.yaml", ["tenants=[]"]).tenants == []


@pytest.mark.parametrize(
    ("tenants", "field"),
    [
        ("[{name: a, key_sha256: sk-my-real-key}]", "tenants.0.key_sha256: this value is refused"),
        ("[{name: a, key_sha256: [sk-my-real-key]}]", "tenants.0.key_sha256: this value is refused"),
        ("{name: a, key_sha256: sk-my-real-key}", "tenants: this value is refused"),
        ("[sk-my-real-key]", "tenants.0: this value is refused"),
        ("[{name: A A, key_sha256: sk-my-real-key}]", "tenants.0.key_sha256"),
        (f"[{{name: [1], key_sha256: {'a' * 64}}}]", "tenants.0.name: [1] is refused"),
    ],
)
def test_a_key_that_was_pasted_by_mistake_is_not_shown(tmp_path: Path, tenants: str, field: str) -> None:
    (tmp_path / "s.yaml").write_text(f"base: b\ntenants: {tenants}\n")
    with pytest.raises(ConfigError) as raised:
        load(ServeConfig, tmp_path / "s.yaml")
    assert field in str(raised.value) and "sk-my" not in str(raised.value)


def test_a_key_is_not_shown_by_repr() -> None:
    assert "0" * 64 not in repr(ServeConfig(base="b", tenants=[{"name": "t", "key_sha256": "0" * 64}]))  # type: ignore[list-item]
