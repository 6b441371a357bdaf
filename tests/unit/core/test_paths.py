from typing import Any

import pytest

from ftray.core.errors import ConfigError
from ftray.core.paths import paths, set_path, value_at

DATA: dict[str, Any] = {
    "n": 3,
    "adapt": "lora",
    "mixture": [{"source": "a", "weight": 1.0}, {"source": "a.jsonl", "weight": 2.0}],
    "steps": [{"type": "clean"}, {"type": "keep", "by": "x"}, {"type": "keep", "by": "y"}, "length"],
    "columns": {"a.b": "c"},
}


def test_every_part_has_one_path_that_leads_to_it() -> None:
    found = paths(DATA)
    assert len(found) == len(set(found))
    assert {"mixture.a.weight", "mixture.a.jsonl.weight", "steps.clean", "steps.2.by", "columns.a.b"} < set(
        found
    )
    assert not {"mixture.0", "steps.keep"} & set(found)
    assert value_at(DATA, "mixture.a.weight") == 1.0 and value_at(DATA, "mixture.a.jsonl.weight") == 2.0
    assert value_at(DATA, "steps.1.by") == "x" and value_at(DATA, "columns.a.b") == "c"
    assert value_at(DATA, "steps.keep.by") is None and value_at(DATA, "n.x") is None


@pytest.mark.parametrize(
    "path",
    [
        "n",
        "adapt",
        "mixture",
        "mixture.a.weight",
        "mixture.a.jsonl.weight",
        "steps.1.by",
        "steps.3",
        "columns.a.b",
    ],
)
def test_a_value_that_is_set_is_there_and_nothing_else_has_changed(path: str) -> None:
    changed, before = dict(DATA), repr(DATA)
    set_path(changed, path, "new")
    assert value_at(changed, path) == "new" and repr(DATA) == before
    set_path(changed, path, value_at(DATA, path))
    assert changed == DATA


def test_a_name_opens_into_a_mapping_also_in_a_list() -> None:
    changed = dict(DATA)
    set_path(changed, "adapt.r", 4)
    set_path(changed, "steps.3.max_chars", 9)
    assert changed["adapt"] == {"type": "lora", "r": 4}
    assert changed["steps"][3] == {"type": "length", "max_chars": 9}


def test_an_element_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        set_path(dict(DATA), "mixture.wiki.weight", 1)
    assert str(caught.value) == (
        "mixture.wiki.weight: the list has no element `wiki.weight`; its elements are: a.jsonl, a"
    )
    with pytest.raises(ConfigError, match="`n` is 3, which has no fields"):
        set_path(dict(DATA), "n.x", 1)
