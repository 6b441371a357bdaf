"""Coloured tokens: every token once, what is learnt told apart with colours and without."""

from pathlib import Path

import numpy as np
from rich.style import Style

from ftray.cli.tokens import shown
from ftray.data.inspect import Document
from ftray.data.read import IGNORE_INDEX
from ftray.data.rows import parse_row, to_table
from ftray.data.tokenise import Tokeniser, tokenise
from ftray.testing.tiny import byte_tokenizer


def test_what_is_learnt_is_told_apart(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    tok = Tokeniser(str(tmp_path))
    messages = [
        {"role": "user", "content": "é?"},
        {"role": "assistant", "content": "[日]"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c", "weight": 0.5},
    ]
    found = tokenise(to_table([(0, 0, parse_row({"messages": messages}))]), tok).documents
    ids, targets = found.input_ids.tolist(), (found.labels != IGNORE_INDEX).tolist()
    document = Document(ids, targets, found.weights.tolist())
    marked = shown(document, tok, marks=True).plain
    assert marked == "é?\n# Answer:⟦ [日]<|end|>⟧b\n# Answer:⟦ c<|end|>⟧"
    text = shown(document, tok, marks=False)
    assert text.plain == tok.hf.decode(ids)
    styles = {text.plain[span.start : span.end]: Style.parse(str(span.style)) for span in text.spans}
    colours = {str(style.color.name).removeprefix("bright_") for style in styles.values() if style.color}
    assert colours == {"green", "yellow", "white"}
    assert styles["<|end|>"].underline and not styles["c"].underline
    assert "日" in styles and np.isclose(found.weights[-1], 0.5)
