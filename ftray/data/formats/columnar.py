"""Parquet and Arrow files: units are runs of row groups or record batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ftray.data.formats.base import Record, Unit, is_damage, is_url, opened
from ftray.data.spans import BadRow

_BATCH_ROWS = 1024
_BATCH_BYTES = 4 << 20
"""Rows are made into Python objects so many at once, of long ones fewer."""
_READ_BYTES = 256 << 10
_ARROW_FILE = b"ARROW1"
_ERRORS = (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError)
Sizes = list[int]


def parquet_sizes(file: str) -> Sizes:
    """Compressed bytes of each row group; empty if the file cannot be read as Parquet."""
    with opened(file) as stream:
        try:
            metadata = pq.ParquetFile(stream).metadata
        except _ERRORS as error:
            if not is_damage(error):
                raise
            return []
        return [_group_size(metadata.row_group(index)) for index in range(metadata.num_row_groups)]


def _group_size(group: Any) -> int:
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))


def arrow_sizes(file: str) -> Sizes:
    """Bytes of each record batch; empty if that is not known without reading the file."""
    if is_url(file):
        return []
    try:
        with _arrow_batches(file) as batches:
            return [batch.nbytes for batch in batches]
    except _ERRORS as error:
        if not is_damage(error):
            raise
        return []


def read_parquet(unit: Unit, columns: frozenset[str]) -> Iterator[Record]:
    """A row for each row; of the columns only those asked for."""
    with opened(unit.file) as stream:
        first = number = 0
        try:
            # Buffered, a column of a row group is read a little at a time instead of whole.
            parquet = pq.ParquetFile(stream, buffer_size=_READ_BYTES)
            groups = range(*(unit.parts or (0, parquet.metadata.num_row_groups)))
            first = sum(parquet.metadata.row_group(index).num_rows for index in range(groups.start))
            names = _chosen(parquet.schema_arrow.names, columns)
            rows = min((_batch_rows(parquet.metadata.row_group(index)) for index in groups), default=1)
            for batch in parquet.iter_batches(rows, row_groups=list(groups), columns=names):
                for value in _values(batch):
                    yield Record(first + number, number, value)
                    number += 1
        except _ERRORS as error:
            if not is_damage(error):
                raise
            yield _lost(first, number, "the Parquet file is truncated or damaged")


def read_arrow(unit: Unit, columns: frozenset[str]) -> Iterator[Record]:
    """A row for each row; of the columns only those asked for."""
    first = number = 0
    start, stop = unit.parts or (0, None)
    try:
        with _arrow_batches(unit.file) as batches:
            for index, batch in enumerate(batches):
                if index < start:
                    first += batch.num_rows
                    continue
                if stop is not None and index >= stop:
                    return
                for part in _slices(batch.select(_chosen(batch.schema.names, columns))):
                    for value in _values(part):
                        yield Record(first + number, number, value)
                        number += 1
    except _ERRORS as error:
        if not is_damage(error):
            raise
        yield _lost(first, number, "the Arrow file is truncated or damaged")


def _batch_rows(group: Any) -> int:
    """Rows of a Parquet row group to read at once."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Views of a batch, which may hold any number of rows."""
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


@contextmanager
def _arrow_batches(file: str) -> Iterator[Iterator[pa.RecordBatch]]:
    """The batches of a file in the stream or the file form of Arrow's IPC."""
    with opened(file) as stream:
        is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
        stream.seek(0)
        # Mapped, the batches that are passed over are not read.
        empty = not is_url(file) and Path(file).stat().st_size == 0
        source = stream if is_url(file) or empty else pa.memory_map(file)
        if is_file:
            reader = pa.ipc.open_file(source)
            yield (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            yield iter(pa.ipc.open_stream(source))


def _chosen(names: list[str], columns: frozenset[str]) -> list[str]:
    """The columns to read; one at least, so that rows are counted."""
    found = [name for name in names if name in columns]
    return found or names[:1]


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    """Rows without what is null, which a table of several shapes has."""
    try:
        rows = batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        # One of them cannot be had: take each by itself.
        for index in range(batch.num_rows):
            yield _value(batch.slice(index, 1))
        return
    for row in rows:
        yield _without_nulls(row)


def _value(row: pa.RecordBatch) -> dict[str, Any] | BadRow:
    try:
        return _without_nulls(row.to_pylist()[0])
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, OverflowError):
        return BadRow("a value that cannot be read")


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _clean(value) for name, value in row.items() if value is not None}


def _clean(value: Any) -> Any:
    """A value without what its struct has only since other rows have it."""
    if isinstance(value, dict):
        return _without_nulls(value)
    return [_clean(item) for item in value] if isinstance(value, list) else value


def _lost(first: int, number: int, why: str) -> Record:
    return Record(first + number, number, BadRow(f"{why}: the rest is lost after {first + number:,} rows"))
