"""Rows: the shapes that are read, and the reason given for each that is not."""

import json

import numpy as np
import pytest

from ftray.data.rows import (
    BadRow,
    Row,
    Span,
    parse_line,
    per_row,
    span_counts,
    span_texts,
    to_table,
    with_span_texts,
)


def test_shapes() -> None:
    assert parse_line(b'{"text": "a", "id": 3}') == Row("text", (Span("text", "a", True),))
    row = parse_line(b'{"prompt": "", "completion": " b"}')
    assert row == Row("prompt_completion", (Span("prompt", "", False), Span("completion", " b", True)))
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "first", "weight": 0},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "last"},
    ]
    row = parse_line(json.dumps({"messages": messages}).encode())
    assert row.shape == "messages"
    assert [span.text for span in row.spans] == ["", "hi there", "first", "again", "last"]
    assert [span.target for span in row.spans] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b'{"text": ', "not JSON: Expecting value"),
        (b'{"text": "a", "score": NaN}', "not JSON: NaN"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON: a number"),
        (b"[" * 100_000, "not JSON: a number or a nesting"),
        (b'["text"]', "not a JSON object"),
        (b'{"txt": "a"}', "no `messages`"),
        (b'{"text": 3}', "`text` is not a string"),
        (b'{"text": null}', "`text` is not a string"),
        (b'{"text": ""}', "the text to learn is empty"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "a", "completion": ""}', "the text to learn is empty"),
        (b'{"messages": []}', "not a list of messages"),
        (b'{"messages": ["hi"]}', "not an object"),
        (b'{"messages": [{"role": "robot", "content": ""}]}', "`role` is none of"),
        (b'{"messages": [{"role": "user", "content": null}]}', "`content` is not text"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "nothing to learn"),
        (b'{"messages": [{"role": "assistant", "content": ""}]}', "the text to learn is empty"),
        (b'{"messages": [{"role": "assistant", "content": "a", "weight": -1}]}', "`weight` is not"),
    ],
)
def test_bad_rows_have_their_reason(line: bytes, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        parse_line(line)


def test_table_keeps_rows_whole() -> None:
    rows = [
        (0, 0, Row("prompt_completion", (Span("prompt", "é", False), Span("completion", "b", True, 0.5)))),
        (9, 1, Row("text", (Span("text", "line\u2028end", True),))),
    ]
    table = to_table(rows)
    assert table["spans"].to_pylist()[0][1] == {
        "kind": "completion",
        "text": "b",
        "target": True,
        "weight": 0.5,
    }
    assert span_counts(table).tolist() == [2, 1]
    assert per_row(table, np.array([1, 2, 4])).tolist() == [3, 4]
    filtered = table.filter([False, True])
    assert span_texts(filtered).to_pylist() == ["line\u2028end"]
    changed = with_span_texts(filtered, span_texts(filtered).cast("string"))
    assert changed.equals(filtered.combine_chunks())
    assert to_table([]).num_rows == 0
    assert len(span_texts(to_table([]))) == 0
