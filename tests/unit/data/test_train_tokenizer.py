"""The trained tokenizer: loads as an ordinary folder, loses no byte, renders conversations that grow at the end."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.core.errors import DataError
from ftray.data.rows import parse_row, to_table
from ftray.data.tokenise import Tokeniser, tokenise
from ftray.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    rows: list[Any] = [{"text": f"def function_{i}(self): return self.value + {i}"} for i in range(200)]
    rows += [{"prompt": "a prompt", "completion": " a completion"}, {"bad": 1}]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert train_tokenizer([str(root / "rows.jsonl")], root / "tokenizer", vocab_size=280) == 1
    return root / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(trained)


def test_it_has_the_size_and_specials_asked_for(tokenizer: Any) -> None:
    assert len(tokenizer) == 280
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert len(tokenizer.encode(" return self.value")) < 15
    assert tokenizer.tokenize("123") == ["1", "2", "3"]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50).filter(lambda text: "<|" not in text))
@settings(deadline=None)
def test_every_text_survives(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_conversations_grow_at_the_end(trained: Path, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "brief\none\n# Answer: first<|end|>two\n# Answer: second<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert rendered == prompt + " second<|end|>"
    documents, bad, *_ = tokenise(
        to_table([(0, 0, parse_row({"messages": messages}))]), Tokeniser(str(trained))
    )
    assert bad == [] and tokenizer.decode(documents.input_ids) == rendered


def test_mistakes(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is there already"):
        train_tokenizer([str(trained.parent / "rows.jsonl")], trained)
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="no row that can be used"):
        train_tokenizer([str(tmp_path / "bad.jsonl")], tmp_path / "t")
