"""Rows between the steps of preparation: parsed from JSON, then an Arrow table of typed spans.

The table's schema is `ROW_SCHEMA`, so a transform is a function on columns.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ftray.data.shapes import parse_row
from ftray.data.spans import ROLES, BadRow, Row, Span

__all__ = [
    "ROLES",
    "ROW_SCHEMA",
    "BadRow",
    "Row",
    "Span",
    "parse_line",
    "parse_row",
    "per_row",
    "rows_in",
    "span_counts",
    "span_kinds",
    "span_targets",
    "span_texts",
    "to_table",
    "with_span_texts",
]

SPAN_TYPE = pa.struct(
    [("kind", pa.string()), ("text", pa.string()), ("target", pa.bool_()), ("weight", pa.float32())]
)
ROW_SCHEMA = pa.schema(
    [("offset", pa.int64()), ("line", pa.int64()), ("shape", pa.string()), ("spans", pa.list_(SPAN_TYPE))]
)
"""`offset`: where the row begins in its file; `line`: its number within its work unit, from 0."""


def parse_line(line: bytes, columns: Mapping[str, str] | None = None) -> Row:
    """Parse one line of JSON; `columns` as `parse_row`. Raises `BadRow` with the reason it cannot be used."""
    try:
        value = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRow("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, brackets nested without end
        raise BadRow("not JSON: a number or a nesting beyond any limit") from None
    if not isinstance(value, dict):
        raise BadRow("not a JSON object")
    return parse_row(value, columns)


def _refuse_constant(name: str) -> NoReturn:
    raise BadRow(f"not JSON: {name}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise BadRow("a key stands twice in an object")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


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


def rows_in(table: pa.Table) -> Iterator[Row]:
    """The rows of a table of `ROW_SCHEMA`."""
    for shape, spans in zip(table["shape"].to_pylist(), table["spans"].to_pylist(), strict=True):
        yield Row(shape, tuple(Span(**span) for span in spans))


def span_texts(rows: pa.Table) -> pa.StringArray:
    """The texts of all spans of all rows, one after another."""
    return _flat_spans(rows).field("text")


def span_kinds(rows: pa.Table) -> pa.StringArray:
    """The kinds of all spans, in the order of `span_texts`."""
    return _flat_spans(rows).field("kind")


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
