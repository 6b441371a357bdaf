"""Whole characters, and stop strings wherever they are split."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from ftray.engine.fake import ByteTokenizer
from ftray.engine.text import Detokeniser, StopStrings
from ftray.model.tokenizer import load_tokenizer

TEXTS = ["plain", "naïve café", "🙂🙃", "👩‍👩‍👧 family", "日本語", "a\u0301 combining", "x" * 100 + "🙂" * 40]


@pytest.mark.parametrize("text", TEXTS)
def test_increments_join_to_the_text_and_hold_no_broken_character(text: str) -> None:
    detokeniser = Detokeniser(ByteTokenizer())
    parts = [detokeniser.feed([byte]) for byte in text.encode()]
    assert "".join(parts) + detokeniser.finish() == text
    assert not any("�" in part for part in parts)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_same_through_a_tokenizer_of_transformers(tiny_base: Path, text: str, size: int) -> None:
    tokenizer = load_tokenizer(tiny_base)
    ids = tokenizer.encode(text)
    detokeniser = Detokeniser(tokenizer, tokenizer.encode("before it"))
    parts = [detokeniser.feed(ids[at : at + size]) for at in range(0, len(ids), size)]
    assert "".join(parts) + detokeniser.finish() == text
    assert not any("�" in part for part in parts)


def test_a_character_cut_by_the_end_is_left_out() -> None:
    detokeniser = Detokeniser(ByteTokenizer())
    shown = detokeniser.feed(list("ok 🙂".encode())[:-1])
    assert shown + detokeniser.finish() == "ok "


def test_a_prompt_that_ends_inside_a_character() -> None:
    data = list("ab🙂".encode())
    detokeniser = Detokeniser(ByteTokenizer(), data[:4])
    assert "".join(detokeniser.feed([byte]) for byte in data[4:]) == "🙂"


@pytest.mark.parametrize("prompt", ["ab\ufffd".encode(), b"ab\xff", b"ab\xf0\x9f", b"\x9f" * 9])
@pytest.mark.parametrize("answer", ["yes", "🙂"])
def test_what_is_broken_in_the_prompt_is_not_shown(prompt: bytes, answer: str) -> None:
    detokeniser = Detokeniser(ByteTokenizer(), list(prompt))
    assert "".join(detokeniser.feed([byte]) for byte in answer.encode()) + detokeniser.finish() == answer


@pytest.mark.parametrize("byte", [0xFF, 0x9F, 0xF0])
def test_endless_broken_bytes_are_passed_on_and_forgotten(byte: int) -> None:
    longest = 0

    class Watched(ByteTokenizer):
        def decode(self, token_ids: Sequence[int], **settings: object) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return super().decode(token_ids, **settings)

    detokeniser = Detokeniser(Watched())
    text = "".join(detokeniser.feed([byte]) for _ in range(500)) + detokeniser.feed(list(b"end"))
    assert text == "\ufffd" * 500 + "end"
    assert longest < 32


def test_a_leading_space_survives_a_tokenizer_that_strips_it() -> None:
    class Stripping:
        def decode(self, token_ids: list[int], **_: object) -> str:
            return "".join(f" w{token}" for token in token_ids)[1:]

    detokeniser = Detokeniser(Stripping(), [1, 2])
    assert "".join(detokeniser.feed([token]) for token in range(40)) == "".join(f" w{t}" for t in range(40))


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_stop_string_is_never_shown_however_it_is_split(cut: int) -> None:
    text = "one STOP two"
    stop = StopStrings(["STOP"])
    assert stop.feed(text[:cut]) + stop.feed(text[cut:]) == "one "
    assert stop.met


@pytest.mark.parametrize("cuts", list(itertools.combinations(range(1, 9), 3)))
def test_what_only_looked_like_a_stop_string_is_shown(cuts: tuple[int, ...]) -> None:
    text = "aab aabx"
    stop = StopStrings(["aabc", "bb"])
    pieces = [text[a:b] for a, b in itertools.pairwise((0, *cuts, len(text)))]
    assert "".join(stop.feed(piece) for piece in pieces) + stop.finish() == text
    assert not stop.met


def test_the_first_stop_string_met_wins() -> None:
    stop = StopStrings(["world", "o w"])
    assert stop.feed("hello world") == "hell"
    assert stop.feed("more") == ""
