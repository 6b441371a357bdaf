"""Tokenising: which tokens are learnt, by shape of row and by chat template."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftray.core.errors import DataError
from ftray.data.read import IGNORE_INDEX
from ftray.data.rows import Row, Span, parse_row, to_table
from ftray.data.tokenise import Documents, Tokeniser, tokenise
from ftray.testing.tiny import byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def with_template(folder: Path, template: str | None) -> Tokeniser:
    tokenizer = byte_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return Tokeniser(str(folder))


def run(tok: Tokeniser, *rows: dict[str, Any]) -> tuple[Documents, list[tuple[int, str]]]:
    found = tokenise(to_table((i, i, parse_row(row)) for i, row in enumerate(rows)), tok)
    return found.documents, found.bad


def shown(tok: Tokeniser, documents: Documents) -> list[tuple[str, str]]:
    """Each document's text with the targets' text beside it."""
    result = []
    for start, end in zip(documents.lens.cumsum() - documents.lens, documents.lens.cumsum(), strict=True):
        ids, labels = documents.input_ids[start:end], documents.labels[start:end]
        result.append((tok.hf.decode(ids), tok.hf.decode(labels[labels != IGNORE_INDEX])))
    return result


def test_text_and_prompt_completion(tokenizer_folder: str) -> None:
    tok = Tokeniser(tokenizer_folder)
    documents, bad = run(tok, {"text": "héllo"}, {"prompt": "2+2=", "completion": " 4"}, {"text": "é"})
    assert bad == []
    assert shown(tok, documents)[:2] == [("héllo<|end|>", "éllo<|end|>"), ("2+2= 4<|end|>", " 4<|end|>")]
    assert documents.weights.sum() == (documents.labels != IGNORE_INDEX).sum()
    ends = documents.lens.cumsum()
    assert (documents.labels[ends - documents.lens] == IGNORE_INDEX).all()
    assert np.array_equal(documents.labels[ends - 1], [0, 0, 0])


def test_an_empty_prompt_leaves_the_first_token_without_a_target(tokenizer_folder: str) -> None:
    tok = Tokeniser(tokenizer_folder)
    documents, _ = run(tok, {"prompt": "", "completion": "ab"})
    assert shown(tok, documents) == [("ab<|end|>", "b<|end|>")]


@pytest.mark.parametrize("template", ["own", CHATML])
def test_messages_render_incrementally(tmp_path: Path, tokenizer_folder: str, template: str) -> None:
    tok = Tokeniser(tokenizer_folder) if template == "own" else with_template(tmp_path, template)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one {{ 7 * 7 }}"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ]
    documents, bad = run(tok, {"messages": messages})
    assert bad == []
    [(text, targets)] = shown(tok, documents)
    assert text == tok.hf.apply_chat_template(messages, tokenize=False)
    assert "{{ 7 * 7 }}" in text  # the content of a row is never a template
    space = " " if template == "own" else ""
    assert targets == f"{space}first<|end|>{space}second<|end|>"
    # The context before an answer is what a server encodes for the same conversation.
    prompt = tok.hf.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    ids = tok.hf(prompt, add_special_tokens=False)["input_ids"]
    assert documents.input_ids[: len(ids)].tolist() == ids


def test_weights_of_messages(tokenizer_folder: str) -> None:
    tok = Tokeniser(tokenizer_folder)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "c", "weight": 0.5},
    ]
    documents, _ = run(tok, {"messages": messages})
    assert shown(tok, documents)[0][1] == " c<|end|>"
    assert set(documents.weights.tolist()) == {0.0, 0.5}


def test_no_template_is_a_mistake_of_the_set_up(tmp_path: Path) -> None:
    tok = with_template(tmp_path, None)
    with pytest.raises(DataError, match="no chat template"):
        run(tok, {"messages": [{"role": "assistant", "content": "b"}]})


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer can be loaded") as caught:
        Tokeniser(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_beginning_of_sequence_token_goes_in_front(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", start)]
    )
    tokenizer.save_pretrained(tmp_path)
    tok = Tokeniser(str(tmp_path))
    documents, _ = run(tok, {"text": "ab"}, {"prompt": "a", "completion": "b"})
    assert shown(tok, documents) == [("<|start|>ab<|end|>", "ab<|end|>"), ("<|start|>ab<|end|>", "b<|end|>")]


def test_the_digest_follows_what_decides_the_ids(tmp_path: Path, tokenizer_folder: str) -> None:
    other = with_template(tmp_path, CHATML)
    same = Tokeniser(tokenizer_folder)
    assert same.digest == other.digest
    assert same.template_digest != other.template_digest
    assert Tokeniser(tokenizer_folder).digest == same.digest


def test_a_row_whose_only_token_comes_first_has_no_target(tokenizer_folder: str) -> None:
    tok = Tokeniser(tokenizer_folder)
    tok._eos = ()
    table = to_table([(0, 0, Row("text", (Span("text", "a", True),)))])
    documents, bad, *_ = tokenise(table, tok)
    assert len(documents.lens) == 0 and bad == [(0, "no target token")]
