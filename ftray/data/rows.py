"""Rows as typed spans, before any tokenising: what a line of JSON says, and which parts of it are learnt.

Shapes read: `{"text": ...}`, `{"prompt": ..., "completion": ...}` and `{"messages": [{"role", "content"}]}`.
Other keys of a row are left alone. Between the steps of preparation rows travel as an Arrow table
(`ROW_SCHEMA`), so that a transform is a function on columns.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

ROLES = ("system", "user", "assistant")

SPAN_TYPE = pa.struct(
    [("kind", pa.string()), ("text", pa.string()), ("target", pa.bool_()), ("weight", pa.float32())]
)
ROW_SCHEMA = pa.schema(
    [("offset", pa.int64()), ("line", pa.int64()), ("shape", pa.string()), ("spans", pa.list_(SPAN_TYPE))]
)
"""`offset`: the row's first byte in its file; `line`: its line number within its work unit, from 0."""


class BadRow(Exception):
    """Why a row is quarantined; the text names no value of the row, so that equal reasons can be counted."""


@dataclass(frozen=True)
class Span:
    """A piece of a row's text."""

    kind: str
    """`text`, `prompt`, `completion` or the role of a message."""
    text: str
    """The characters."""
    target: bool
    """True if the model learns to produce it."""
    weight: float = 1.0
    """Weight of its tokens in the loss."""


@dataclass(frozen=True)
class Row:
    """One parsed row."""

    shape: str
    """`text`, `prompt_completion` or `messages`."""
    spans: tuple[Span, ...]
    """Its pieces in order."""


def parse_line(line: bytes) -> Row:
    """Parse one line of JSON. Raises `BadRow` with the reason it cannot be used."""
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise BadRow("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, brackets nested without end
        raise BadRow("not JSON: a number or a nesting beyond any limit") from None
    if not isinstance(value, dict):
        raise BadRow("not a JSON object")
    return parse_row(value)


def parse_row(value: dict[str, Any]) -> Row:
    """Recognise a row's shape. Raises `BadRow` with the reason it cannot be used."""
    if "messages" in value:
        row = Row("messages", tuple(_messages(value["messages"])))
    elif "prompt" in value and "completion" in value:
        prompt, completion = _text(value, "prompt"), _text(value, "completion")
        row = Row("prompt_completion", (Span("prompt", prompt, False), Span("completion", completion, True)))
    elif "text" in value:
        row = Row("text", (Span("text", _text(value, "text"), True),))
    else:
        raise BadRow("no `messages`, `prompt` + `completion` or `text`")
    if not any(span.target for span in row.spans):
        raise BadRow("nothing to learn: no assistant message with a weight")
    if any(span.target and not span.text for span in row.spans):
        raise BadRow("the text to learn is empty")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise BadRow(f"not JSON: {name}")


def _text(mapping: dict[str, Any], key: str) -> str:
    value = mapping[key]
    if not isinstance(value, str):
        raise BadRow(f"`{key}` is not a string")
    return _checked(value)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("a lone surrogate, which no UTF-8 text can hold") from None
    return text


def _messages(messages: Any) -> Iterable[Span]:
    if not isinstance(messages, list) or not messages:
        raise BadRow("`messages` is not a list of messages")
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("a message is not an object")
        role, weight = message.get("role"), message.get("weight", 1)
        if role not in ROLES:
            raise BadRow("a message's `role` is none of " + ", ".join(ROLES))
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
            raise BadRow("a message's `weight` is not a number of at least 0")
        yield Span(role, _content(message.get("content")), role == "assistant" and weight > 0, float(weight))


def _content(content: Any) -> str:
    """A message's text: a string, or OpenAI's list of text parts."""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(_text(part, "text") if "text" in part else "" for part in content)
    if not isinstance(content, str):
        raise BadRow("a message's `content` is not text")
    return _checked(content)


def to_table(rows: Iterable[tuple[int, int, Row]]) -> pa.Table:
    """Parsed rows with their (offset, line) as a table of `ROW_SCHEMA`."""
    items = list(rows)
    spans = [span for _, _, row in items for span in row.spans]
    flat = pa.StructArray.from_arrays(
        [
            pa.array([span.kind for span in spans], pa.string()),
            pa.array([span.text for span in spans], pa.string()),
            pa.array([span.target for span in spans], pa.bool_()),
            pa.array([span.weight for span in spans], pa.float32()),
        ],
        fields=list(SPAN_TYPE),
    )
    counts = [len(row.spans) for _, _, row in items]
    columns = [
        pa.array([offset for offset, _, _ in items], pa.int64()),
        pa.array([line for _, line, _ in items], pa.int64()),
        pa.array([row.shape for _, _, row in items], pa.string()),
        pa.ListArray.from_arrays(pa.array(_offsets(counts)), flat),
    ]
    return pa.table(columns, schema=ROW_SCHEMA)


def span_texts(rows: pa.Table) -> pa.StringArray:
    """The texts of all spans of all rows, one after another."""
    return _flat_spans(rows).field("text")


def span_targets(rows: pa.Table) -> pa.BooleanArray:
    """Whether each span is a target, in the order of `span_texts`."""
    return _flat_spans(rows).field("target")


def with_span_texts(rows: pa.Table, texts: pa.StringArray) -> pa.Table:
    """The same rows with other texts in their spans."""
    flat = _flat_spans(rows)
    fields = [texts if field.name == "text" else flat.field(field.name) for field in SPAN_TYPE]
    spans = pa.StructArray.from_arrays(fields, fields=list(SPAN_TYPE))
    column = pa.ListArray.from_arrays(pa.array(_offsets(span_counts(rows))), spans)
    return rows.set_column(rows.schema.get_field_index("spans"), ROW_SCHEMA.field("spans"), column)


def span_counts(rows: pa.Table) -> npt.NDArray[np.int32]:
    """Spans of each row."""
    return np.asarray(pc.list_value_length(rows["spans"]), np.int32)


def per_row(rows: pa.Table, of_span: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Sum a number given for every span over the spans of each row (each row has at least one)."""
    if rows.num_rows == 0:
        return np.zeros(0, np.int64)
    return np.add.reduceat(of_span.astype(np.int64), _offsets(span_counts(rows))[:-1])


def _flat_spans(rows: pa.Table) -> pa.StructArray:
    return rows["spans"].combine_chunks().flatten()


def _offsets(counts: Iterable[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int32)
