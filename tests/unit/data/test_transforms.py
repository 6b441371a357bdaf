"""Transforms: what each changes and filters, counted by rule."""

from typing import Any

import numpy as np
import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import parse
from ftray.data.rows import Row, Span, span_texts, to_table
from ftray.data.transform.base import apply_transforms
from ftray.data.transform.clean import Clean
from ftray.data.transform.dedup import ExactDedup
from ftray.data.transform.length import Length


def table(*texts: str):  # type: ignore[no-untyped-def]
    return to_table((i, i, Row("text", (Span("text", text, True),))) for i, text in enumerate(texts))


def test_clean() -> None:
    rows, counts = Clean()(table("a\r\nb\rc\x00\ufeff\td", "e\u0301", " \x07\n", "\u200d\U0001f600 "))
    assert span_texts(rows).to_pylist() == ["a\nb\nc\td", "\u00e9", "\u200d\U0001f600 "]
    assert counts["empty"] == 1
    rows, _ = Clean(unicode_form="none", control_characters="keep")(table("e\u0301\x00"))
    assert span_texts(rows).to_pylist() == ["e\u0301\x00"]


def test_clean_keeps_an_empty_context() -> None:
    rows = to_table([(0, 0, Row("x", (Span("system", "", False), Span("assistant", "ok", True))))])
    kept, counts = Clean()(rows)
    assert kept.num_rows == 1 and counts["empty"] == 0


def test_length_counts_characters() -> None:
    rows, counts = Length(min_chars=2, max_chars=3)(table("é", "éé", "abc", "abcd", "abcde"))
    assert span_texts(rows).to_pylist() == ["éé", "abc"]
    assert counts == {"short": 1, "long": 2}
    with pytest.raises(ConfigError, match="max_chars: 1 is below min_chars"):
        parse(Length, {"min_chars": 2, "max_chars": 1})


def test_dedup_keeps_the_first_over_units() -> None:
    dedup = ExactDedup()
    first, second = table("a  b", "c", "A b\n"), table("C", "d")
    masks = dedup.keep([dedup.keys(first), dedup.keys(second)])
    assert [mask.tolist() for mask in masks] == [[True, True, False], [False, True]]
    exact = ExactDedup(ignore_case=False, ignore_space=False)
    assert len(set(exact.keys(first))) == 3


def test_dedup_tells_where_spans_end() -> None:
    def pair(prompt: str, completion: str) -> Row:
        return Row("x", (Span("prompt", prompt, False), Span("completion", completion, True)))

    keys = ExactDedup().keys(to_table([(0, 0, pair("ab", "c")), (1, 1, pair("a", "bc"))]))
    assert keys[0] != keys[1]


def test_barriers_stop_until_they_are_decided() -> None:
    steps = [Length(min_chars=2), ExactDedup(), Length(max_chars=3)]
    rows = table("x", "aa", "AA", "bbbb")
    waiting = apply_transforms(rows, steps, [])
    assert waiting.keys is not None and len(waiting.keys) == 3
    done = apply_transforms(rows, steps, [np.array([True, False, True])])
    assert done.keys is None
    assert span_texts(done.rows).to_pylist() == ["aa"]
    assert done.filtered == {"length.short": 1, "dedup.duplicate": 1, "length.long": 1}


def test_transforms_are_named_in_the_recipe() -> None:
    data = DataConfig(train=["x"], transforms=["clean", {"type": "length", "max_chars": 9}])  # type: ignore[list-item]
    assert data.transforms == [Clean(), Length(max_chars=9)]


def test_a_stream_takes_no_barrier() -> None:
    transforms: list[Any] = ["clean", "dedup", "length"]
    with pytest.raises(ConfigError, match="stream: `dedup` must see all rows") as caught:
        parse(DataConfig, {"train": "x", "transforms": transforms, "stream": True})
    assert "\n" not in str(caught.value)
    assert parse(DataConfig, {"train": "x", "transforms": ["clean", "length"], "stream": True}).stream
    assert not parse(DataConfig, {"train": "x", "transforms": transforms}).stream
