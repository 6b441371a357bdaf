"""Source files: which there are, the units they are worked on in, and the records of a unit.

A source is a path, a glob, a folder, a folder that `datasets` saved, a Hub id or any URL that fsspec opens; with
`#500` behind it, 500 of its rows are taken. A new format is a module in `ftray/data/formats` and two lines here.
"""

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ftray.core.errors import DataError
from ftray.data.formats.base import COMPRESSIONS, Record, Unit, is_url
from ftray.data.formats.columnar import arrow_sizes, parquet_sizes, read_arrow, read_parquet
from ftray.data.formats.delimited import read_csv, read_tsv
from ftray.data.formats.json_file import read_json
from ftray.data.formats.text import read_document, read_jsonl, read_lines_of_text, read_paragraphs
from ftray.data.listing import Found, list_files
from ftray.data.order import Permutation
from ftray.data.rows import parse_line
from ftray.data.shapes import FIELDS, parse_row
from ftray.data.spans import BadRow, Row

__all__ = ["UNIT_BYTES", "Line", "Record", "Records", "Source", "Unit", "find_files", "find_sources"]
__all__ += ["parse_record", "read_lines", "split_units"]

UNIT_BYTES = 4 << 20
SampleBy = Literal["document", "paragraph", "line"]
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
}
READERS: dict[str, Callable[[Unit], Iterator[Record]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "line": read_lines_of_text,
    "paragraph": read_paragraphs,
    "document": read_document,
}
_SIZES = {"parquet": parquet_sizes, "arrow": arrow_sizes}
_TEXTS = ("document", "paragraph", "line")
_BY_BYTES = ("jsonl", "line")
"""Formats that can be cut anywhere, if not compressed."""
_SAMPLED = re.compile(r"(.+)#([0-9]{1,12})")


@dataclass(frozen=True)
class Source:
    """One source file."""

    file: str
    """Its absolute path or its URL."""
    pattern: str
    """What named it."""
    format: str
    """How it is read."""
    compression: str
    """`gzip`, `zstd` or none."""
    size_bytes: int
    """Its size."""
    sample: int | None = None
    """Rows to take of all files of its pattern; None: all."""

    @property
    def is_text(self) -> bool:
        """True for plain text, whose rows have no columns."""
        return self.format in _TEXTS


@dataclass(frozen=True)
class Line:
    """One line of a plain file that is not blank."""

    offset: int
    """Its first byte in the file."""
    number: int
    """Its number within the unit, from 0."""
    content: bytes
    """Its bytes without a byte order mark; the line end may be included."""


class Records:
    """The records of a unit, read one after another; blank lines and rows that are not sampled are passed over.

    Args:
        unit: the part of a file.
        columns: as `parse_row`; of a columnar file only what it names is read, or what a known shape has.

    Raises:
        DataError: while they are read, if the file cannot be.
    """

    def __init__(self, unit: Unit, columns: Mapping[str, str] | None = None) -> None:
        self.unit = unit
        self._names = frozenset(columns.values() if columns else FIELDS)
        self.lines = 0
        """Lines (or records) passed so far, blank ones counted."""

    def __iter__(self) -> Iterator[Record]:
        row, taken = -1, None if self.unit.take is None else frozenset(self.unit.take)
        for record in self._all():
            self.lines = record.number + 1
            if record.value is None:
                continue
            row += 1
            if taken is None or row in taken:
                yield record

    def _all(self) -> Iterator[Record]:
        if self.unit.format == "parquet":
            return read_parquet(self.unit, self._names)
        if self.unit.format == "arrow":
            return read_arrow(self.unit, self._names)
        return READERS[self.unit.format](self.unit)


def parse_record(unit: Unit, record: Record, columns: Mapping[str, str] | None = None) -> Row:
    """A record as a row; `columns` as `parse_row`, without effect on plain text. Raises `BadRow`."""
    if isinstance(record.value, bytes):
        return parse_line(record.value, columns)
    if isinstance(record.value, BadRow):
        raise record.value
    assert record.value is not None
    return parse_row(record.value, None if unit.format in _TEXTS else columns)


def find_sources(patterns: Sequence[str], sample_by: SampleBy = "document") -> list[Source]:
    """The files named by paths, globs, folders, Hub ids and URLs, sorted within each, none twice.

    Args:
        patterns: what a user writes; `#500` behind one takes 500 of its rows.
        sample_by: what a row of plain text is.

    Raises:
        DataError: one line, for a pattern that matches nothing or a file of an unknown kind.
    """
    found: dict[str, Source] = {}
    for pattern in patterns:
        match = _SAMPLED.fullmatch(pattern)
        sampled = match is not None and not Path(pattern).expanduser().exists()
        place, sample = (match[1], int(match[2])) if match and sampled else (pattern, None)
        for entry in list_files(place):
            if entry.file not in found:
                source = _source(entry, pattern, sample_by)
                found[entry.file] = replace(source, sample=sample)
    return list(found.values())


def _source(entry: Found, pattern: str, sample_by: SampleBy) -> Source:
    stem, suffix = posixpath.splitext(posixpath.basename(entry.file).lower())
    compression = COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = posixpath.splitext(stem)[1]
    kind = FORMATS.get(suffix, "jsonl" if not suffix else "")
    if not kind or (compression and kind in _SIZES):
        known = ", ".join(FORMATS)
        raise DataError(
            f"{entry.file}: a kind of file that is not read; known: {known}, also .gz and .zst of texts"
        )
    return Source(entry.file, pattern, sample_by if kind == "text" else kind, compression, entry.size_bytes)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The local files that patterns name, as `find_sources`.

    Raises:
        DataError: one line, for a pattern that matches nothing, or names what is not on a disk.
    """
    sources = find_sources(patterns)
    for source in sources:
        if is_url(source.file):
            raise DataError(f"{source.file}: not a local file; copy it to a disk first")
    return [Path(source.file) for source in sources]


def split_units(sources: Sequence[Source | Path], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut sources into work units of about `unit_bytes` where their format can be cut.

    A line that begins in a unit is read whole; a row group or a record batch is never cut.
    """
    units: list[Unit] = []
    given = [item if isinstance(item, Source) else find_sources([str(item)])[0] for item in sources]
    for pattern in dict.fromkeys(source.pattern for source in given):
        group = [source for source in given if source.pattern == pattern]
        found = [unit for source in group for unit in _units(source, unit_bytes)]
        units += found if group[0].sample is None else _sampled(found, group[0].sample)
    return [replace(unit, index=index) for index, unit in enumerate(units)]


def _units(source: Source, unit_bytes: int) -> list[Unit]:
    size = source.size_bytes
    whole = Unit(0, source.file, 0, size, source.format, source.compression)
    if source.format in _SIZES and (sizes := _SIZES[source.format](source.file)):
        return _columnar_units(whole, sizes, unit_bytes)
    if source.format not in _BY_BYTES or source.compression:
        return [whole] if size or source.format in _SIZES else []
    return [
        replace(whole, start=start, stop=min(start + unit_bytes, size))
        for start in range(0, size, unit_bytes)
    ]


def _columnar_units(whole: Unit, sizes: Sequence[int], unit_bytes: int) -> list[Unit]:
    """Runs of parts of at least `unit_bytes`, each with its share of the file's bytes."""
    units: list[Unit] = []
    first = filled = passed = 0
    for part, size in enumerate(sizes):
        filled += size
        if filled >= unit_bytes or part + 1 == len(sizes):
            start = units[-1].stop if units else 0
            passed += filled
            stop = whole.stop * passed // max(1, sum(sizes))
            units.append(replace(whole, start=start, stop=stop, parts=(first, part + 1)))
            first, filled = part + 1, 0
    return units


def _sampled(units: Sequence[Unit], sample: int) -> list[Unit]:
    """The same `sample` rows every time, drawn from all units."""
    counts = [sum(1 for _ in Records(unit)) for unit in units]
    total = sum(counts)
    if total <= sample:
        return list(units)
    rows = np.sort(Permutation(total, 0, 0)(np.arange(sample)))
    taken = []
    for unit, stop, count in zip(units, np.cumsum(counts), counts, strict=True):
        own = rows[(rows >= stop - count) & (rows < stop)] - (stop - count)
        if len(own):
            taken.append(replace(unit, take=tuple(own.tolist())))
    return taken


def read_lines(unit: Unit) -> tuple[list[Line], int]:
    """The lines that begin in a unit of JSON lines, and their number with the blank ones counted.

    Raises:
        DataError: if the file cannot be read, or is not JSON lines.
    """
    if unit.format != "jsonl":
        raise DataError(f"{unit.file}: not a file of JSON lines, which are read here")
    records = Records(unit)
    lines = []
    for record in records:
        if not isinstance(record.value, bytes):
            raise DataError(f"{unit.file}: {record.value}")
        lines.append(Line(record.offset, record.number, record.value))
    return lines, records.lines
