"""Every row of a file is answered or quarantined with its place and reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftray.data.rows import BadRow
from ftray.data.source import split_units
from ftray.data.tokenise import Tokeniser
from ftray.engine.api import Request, Sampling
from ftray.engine.batch import generate_unit, numbered, prompt_segments
from ftray.engine.core import StepEngine
from ftray.engine.torch_engine import TorchEngineConfig

ROWS: list[Any] = [
    {"prompt": "one", "id": 7},
    {"messages": [{"role": "user", "content": "two"}]},
    "not an object",
    {"prompt": "x" * 600},
    {"prompt": 3},
    {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "known"}]},
    {"text": "no prompt"},
    {"prompt": "one", "completion": "known"},
]
SAMPLING = Sampling(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tiny_adapters: dict[str, Path]) -> StepEngine:
    engine = TorchEngineConfig().build(str(tiny_base))
    engine.load_delta("a", str(tiny_adapters["a"]))
    return engine


@pytest.fixture(scope="module")
def tok(tiny_base: Path) -> Tokeniser:
    return Tokeniser(str(tiny_base))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_bytes(("\n".join(lines[:2]) + "\n\n").encode() + b"\xff\n" + "\n".join(lines[2:]).encode())
    return path


@pytest.mark.parametrize("unit_bytes", [1 << 20, 100])
def test_rows_in_are_answers_and_quarantined_rows(
    engine: StepEngine, tok: Tokeniser, source: Path, unit_bytes: int
) -> None:
    units = split_units([source], unit_bytes)
    results = list(numbered(generate_unit(engine, tok, unit, "a", SAMPLING) for unit in units))
    answered = [row for result in results for row in result.answered]
    bad = [row for result in results for row in result.quarantined]
    assert [row["line"] for row in answered] == [0, 1, 7, 9]
    assert [row["input"] for row in answered] == [ROWS[0], ROWS[1], ROWS[5], ROWS[7]]
    reasons = ["UTF-8", "object", "600 tokens", "not a string", "no `messages`"]
    for row, line, word in zip(bad, [3, 4, 5, 6, 8], reasons, strict=True):
        assert (row["line"], row["file"]) == (line, str(source))
        assert word in row["reason"]
    assert source.read_bytes()[bad[0]["offset"] :].startswith(b"\xff")
    # What a row already answers is asked again.
    assert answered[1]["output"] == answered[2]["output"]
    assert answered[0]["output"] == answered[3]["output"]
    assert engine.stats().blocks_used == 0


def test_the_prompt_is_what_serving_would_see(engine: StepEngine, tok: Tokeniser, source: Path) -> None:
    ids = engine.tokenizer.apply_chat_template(
        ROWS[1]["messages"], add_generation_prompt=True, return_dict=False
    )
    served = engine.generate([Request(id="x", prompt_ids=ids, delta="a", sampling=SAMPLING)])[0]
    unit = split_units([source])[0]
    assert generate_unit(engine, tok, unit, "a", SAMPLING).answered[1]["output"] == served.text
    assert tok.encode([prompt_segments(ROWS[1], tok)])[0] == [ids]


def test_seeded_rows_differ_and_repeat(engine: StepEngine, tok: Tokeniser, tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text('{"prompt": "same"}\n' * 3)
    warm = Sampling(max_tokens=12, temperature=1.5, seed=1, ignore_eos=True)
    unit = split_units([path])[0]
    first, second = (
        [row["output"] for row in generate_unit(engine, tok, unit, None, warm).answered] for _ in "12"
    )
    assert first == second
    assert len(set(first)) == 3


@pytest.mark.parametrize("messages", [[], "x", [{"role": "assistant", "content": "x"}], [{"role": "user"}]])
def test_messages_without_a_question(tok: Tokeniser, messages: Any) -> None:
    with pytest.raises(BadRow):
        prompt_segments({"messages": messages}, tok)
