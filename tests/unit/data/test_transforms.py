"""Transforms: what each changes and filters, counted by rule."""

from typing import Any

import numpy as np
import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import parse
from ftray.data.rows import Row, Span, span_texts, to_table
from ftray.data.transform.base import Decision, apply_transforms
from ftray.data.transform.clean import Clean
from ftray.data.transform.dedup import ExactDedup
from ftray.data.transform.language import Language
from ftray.data.transform.length import Length
from ftray.data.transform.quality import Quality


def table(*texts: str):  # type: ignore[no-untyped-def]
    return to_table((i, i, Row("text", (Span("text", text, True),))) for i, text in enumerate(texts))


def test_clean() -> None:
    rows, counts, changed = Clean()(
        table("a\r\nb\rc\x00\ufeff\td", "e\u0301", " \x07\n", "\u200d\U0001f600 ")
    )
    assert span_texts(rows).to_pylist() == ["a\nb\nc\td", "\u00e9", "\u200d\U0001f600 "]
    assert counts["empty"] == 1
    assert changed == {"unicode_form": 1, "line_ends": 1, "control_characters": 2}
    rows, *_ = Clean(unicode_form="none", control_characters="keep")(table("e\u0301\x00"))
    assert span_texts(rows).to_pylist() == ["e\u0301\x00"]


def test_clean_keeps_an_empty_context() -> None:
    rows = to_table([(0, 0, Row("x", (Span("system", "", False), Span("assistant", "ok", True))))])
    kept, counts, _ = Clean()(rows)
    assert kept.num_rows == 1 and counts["empty"] == 0


def test_length_counts_characters() -> None:
    rows, counts, _ = Length(min_chars=2, max_chars=3)(table("é", "éé", "abc", "abcd", "abcde"))
    assert span_texts(rows).to_pylist() == ["éé", "abc"]
    assert counts == {"short": 1, "long": 2}
    with pytest.raises(ConfigError, match="max_chars: 1 is below min_chars"):
        parse(Length, {"min_chars": 2, "max_chars": 1})


def test_clean_rules_that_are_asked_for() -> None:
    clean = Clean(invisible_characters="remove", trailing_space="remove", max_blank_lines=1, line_ends="keep")
    rows, _, changed = clean(table("a\u200bb\u00ad", "a  \nb\t", "a\n\n \n\nb\n\nc", "x\r\ny", "plain"))
    assert span_texts(rows).to_pylist() == ["ab", "a\nb", "a\n\nb\n\nc", "x\r\ny", "plain"]
    assert changed == {"invisible_characters": 1, "trailing_space": 2, "max_blank_lines": 1}


def test_length_counts_words() -> None:
    rows, counts, _ = Length(min_words=2, max_words=3)(table("a", "a b", "a\nb c", "a b c d"))
    assert span_texts(rows).to_pylist() == ["a b", "a\nb c"]
    assert counts == {"few_words": 1, "many_words": 1}


def test_language() -> None:
    texts = {
        "en": "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised by it.",
        "de": "Der schnelle braune Fuchs springt über den faulen Hund, und niemand im Dorf war überrascht.",
        "fr": "Le renard brun et rapide saute par-dessus le chien paresseux, et personne n'en fut surpris.",
        "ja": "素早い茶色の狐がのろまな犬を飛び越えたが、村の誰も驚かなかったという話である。",
    }
    rows = table(*texts.values(), "ok", "12345 67890 12345 67890")
    kept, counts, unjudged = Language(keep=["en", "ja"])(rows)
    assert span_texts(kept).to_pylist()[:3] == [texts["en"], texts["ja"], "ok"]
    assert counts["de"] == counts["fr"] == 1 and unjudged["short"] == 1
    with pytest.raises(ConfigError, match="keep: 'english' is no language known here"):
        parse(Language, {"keep": ["english"]})


def test_quality() -> None:
    prose = (
        "It was a bright cold day in the month of spring and all the clocks of the old town were striking. "
    )
    rows = table(
        prose * 4,
        prose,
        "a b c d e " * 20,
        "# heading ... " * 40,
        "12 34567 8901 " * 40,
        "\n".join(f"- an item of the long shopping list for today {i}" for i in range(20)),
        "\n".join(f"line number {i} goes on and on and on ..." for i in range(20)),
        "\n".join(["the same line of words again"] * 15),
    )
    kept, counts, _ = Quality(max_symbols=0.3)(rows)
    assert span_texts(kept).to_pylist() == [prose * 4]
    rules = ["few_words", "short_words", "symbols", "not_alphabetic", "bullets", "ellipses", "repeated_lines"]
    assert +counts == dict.fromkeys(rules, 1)


def test_dedup_keeps_the_first_over_units() -> None:
    dedup = ExactDedup()
    first, second = table("a  b", "c", "A b\n"), table("C", "d")
    masks = dedup.keep([dedup.keys(first), dedup.keys(second)])
    assert [mask.tolist() for mask in masks] == [[True, True, False], [False, True]]
    exact = ExactDedup(ignore_case=False, ignore_space=False)
    assert len(set(exact.keys(first))) == 3


def test_dedup_tells_what_spans_are() -> None:
    spans = [Span("prompt", "q", False), Span("desirable", "a", True)]
    rows = [Row("x", tuple(spans)), Row("x", (spans[0], Span("undesirable", "a", True)))]
    keys = ExactDedup().keys(to_table((i, i, row) for i, row in enumerate(rows)))
    assert keys[0] != keys[1]


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
    done = apply_transforms(rows, steps, [Decision(np.array([True, False, True]))])
    assert done.keys is None
    assert span_texts(done.rows).to_pylist() == ["aa"]
    assert done.filtered == {"length.short": 1, "dedup.duplicate": 1, "length.long": 1}


def test_transforms_are_named_in_the_recipe() -> None:
    data = DataConfig(train=["x"], transforms=["clean", {"type": "length", "max_chars": 9}])  # type: ignore[list-item]
    assert data.transforms == [Clean(), Length(max_chars=9)]


def test_a_stream_takes_no_barrier() -> None:
    transforms: list[Any] = ["clean", "dedup", "near_dedup", "length"]
    with pytest.raises(ConfigError, match="stream: `near_dedup` must see all rows") as caught:
        parse(DataConfig, {"train": "x", "transforms": transforms, "stream": True})
    assert "\n" not in str(caught.value)
    assert parse(DataConfig, {"train": "x", "transforms": ["clean", "dedup"], "stream": True}).stream
    assert not parse(DataConfig, {"train": "x", "transforms": transforms}).stream
