"""Rows to questions: rendered as in training, bad rows named, answers in place of others."""

import json
from pathlib import Path

import pytest

from ftray.core.errors import DataError
from ftray.data.rows import parse_line, to_table
from ftray.data.tokenise import Tokeniser, tokenise
from ftray.eval.questions import answer_ids, majority, read_answers, read_questions

CHAT = {
    "messages": [
        {"role": "system", "content": "Name the package."},
        {"role": "user", "content": "def loads(s): ..."},
        {"role": "assistant", "content": "json"},
        {"role": "user", "content": "def sleep(s): ..."},
        {"role": "assistant", "content": "time"},
    ]
}
PLAIN = {"prompt": "2 + 2 =", "completion": " 4"}


@pytest.fixture
def tok(tiny_base: Path) -> Tokeniser:
    return Tokeniser(str(tiny_base))


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row", [CHAT, PLAIN])
def test_prompt_and_answer_are_the_tokens_of_training(
    tmp_path: Path, tok: Tokeniser, row: dict[str, object]
) -> None:
    (question,) = read_questions([write(tmp_path / "rows.jsonl", row)], tok).items
    trained, *_ = tokenise(to_table([(0, 0, parse_line(json.dumps(row).encode()))]), tok)
    (answer,) = answer_ids(question, [question.expected], tok)
    assert [*question.prompt_ids, *answer] == trained.input_ids.tolist()
    assert answer == [token for token in trained.labels.tolist() if token != -100][-len(answer) :]


def test_prompt_is_what_the_chat_template_gives_for_generation(tmp_path: Path, tok: Tokeniser) -> None:
    (question,) = read_questions([write(tmp_path / "rows.jsonl", CHAT)], tok).items
    served = tok.hf.apply_chat_template(CHAT["messages"][:-1], add_generation_prompt=True, return_dict=False)
    assert question.prompt_ids == served
    assert question.expected == "time"


def test_other_answers_take_the_place_of_the_last(tmp_path: Path, tok: Tokeniser) -> None:
    (question,) = read_questions([write(tmp_path / "rows.jsonl", CHAT)], tok).items
    texts = [tok.hf.decode(ids) for ids in answer_ids(question, ["json", "time"], tok)]
    assert texts == [" json<|end|>", " time<|end|>"]


def test_rows_that_cannot_be_asked_are_named(tmp_path: Path, tok: Tokeniser) -> None:
    path = write(tmp_path / "rows.jsonl", PLAIN, "{broken\n", {"text": "only"}, PLAIN)
    found = read_questions([path], tok)
    assert len(found.items) == 2
    lines = Path(path).read_bytes().splitlines(keepends=True)
    assert [bad["offset"] for bad in found.quarantined] == [len(lines[0]), len(lines[0]) + len(lines[1])]
    assert "not JSON" in found.quarantined[0]["reason"] and "no prompt" in found.quarantined[1]["reason"]
    assert {bad["file"] for bad in found.quarantined} == {path}


def test_max_rows_counts_questions(tmp_path: Path, tok: Tokeniser) -> None:
    path = write(tmp_path / "rows.jsonl", "x\n", *[PLAIN] * 5)
    found = read_questions([path], tok, max_rows=2)
    assert len(found.items) == 2 and len(found.quarantined) == 1


def test_nothing_to_ask_is_an_error(tmp_path: Path, tok: Tokeniser) -> None:
    with pytest.raises(DataError, match="no row can be asked; the first: no prompt"):
        read_questions([write(tmp_path / "rows.jsonl", {"text": "only"})], tok)
    with pytest.raises(DataError, match="no such file"):
        read_questions([str(tmp_path / "none.jsonl")], tok)


def test_majority_takes_the_first_among_equals() -> None:
    assert majority(["b", "a", "b", "a", "c"]) == "a"
    assert majority(["b", "b", "a"]) == "b"


def test_answers_of_training_rows(tmp_path: Path) -> None:
    assert read_answers([write(tmp_path / "rows.jsonl", PLAIN, CHAT, "broken\n")]) == [" 4", "time"]


def test_columns_say_where_the_rows_hold_what(tok: Tokeniser, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"q": "2+2=", "a": " 4"})
    columns = {"prompt": "q", "completion": "a"}
    (question,) = read_questions([path], tok, columns=columns).items
    assert question.expected == " 4"
    assert read_answers([path], columns) == [" 4"]


def test_of_a_preference_pair_the_chosen_answer_is_expected(tok: Tokeniser, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"})
    (question,) = read_questions([path], tok).items
    assert question.expected == " 4" and read_answers([path]) == [" 4"]
    assert answer_ids(question, [" 5"], tok)[0][-1] == tok.hf.eos_token_id
