"""Files of lines: JSON lines, and plain text in rows of a line, a paragraph or a whole file."""

from collections.abc import Iterable, Iterator
from typing import Any

from ftray.core.errors import DataError
from ftray.data.formats.base import Damaged, Record, Unit, blocks, lines, opened, rest_lost
from ftray.data.spans import BadRow

BOM = b"\xef\xbb\xbf"
MAX_DOCUMENT_BYTES = 256 << 20
"""A text file that is one row is held in memory several times over while it is tokenised."""


def read_jsonl(unit: Unit) -> Iterator[Record]:
    """Lines of JSON."""
    return _lines(unit)


def read_lines_of_text(unit: Unit) -> Iterator[Record]:
    """A row for each line of text."""
    for record in _lines(unit):
        if isinstance(record.value, bytes):
            yield Record(record.offset, record.number, as_text(record.value.rstrip(b"\r\n")))
        else:
            yield record


def read_paragraphs(unit: Unit) -> Iterator[Record]:
    """A row for each run of lines between blank ones."""
    first, found, last = 0, list[bytes](), 0
    for record in _lines(unit):
        last = record.number
        if isinstance(record.value, bytes):
            first = first if found else record.offset
            found.append(record.value)
            continue
        if found:
            yield Record(first, record.number, as_text(b"".join(found).rstrip()))
            found = []
        yield record
    if found:
        yield Record(first, last, as_text(b"".join(found).rstrip()))


def read_document(unit: Unit) -> Iterator[Record]:
    """One row for the whole file."""
    pieces: list[bytes] = []
    total = 0
    try:
        for block in blocks(unit):
            pieces.append(block)
            total += len(block)
            if total > MAX_DOCUMENT_BYTES:
                raise DataError(
                    f"{unit.file}: more than {MAX_DOCUMENT_BYTES >> 20} MiB are too much for one row; "
                    "set `data.sample_by` to `paragraph` or `line`"
                )
    except Damaged as error:
        yield Record(0, 0, BadRow(f"{error}: {total:,} bytes could be read"))
        return
    content = b"".join(pieces).removeprefix(BOM)
    yield Record(0, 0, as_text(content) if content.strip() else None)


def as_text(content: bytes) -> dict[str, Any] | BadRow:
    """A row of text, or why it is none."""
    try:
        return {"text": content.decode("utf-8")}
    except UnicodeDecodeError:
        return BadRow("not UTF-8")


def whole_lines(unit: Unit) -> Iterator[tuple[int, int, bytes | Damaged]]:
    """(offset, number, line) of every line of a whole file; damage comes last, as a value."""
    offset = number = 0
    try:
        for line in lines(blocks(unit)):
            yield offset, number, line
            offset, number = offset + len(line), number + 1
    except Damaged as error:
        yield offset, number, error


def _lines(unit: Unit) -> Iterator[Record]:
    found = whole_lines(unit) if unit.compression or unit.format == "paragraph" else _range(unit)
    for offset, number, content in found:
        if isinstance(content, Damaged):
            yield rest_lost(offset, number, str(content))
        else:
            offset, content = without_bom(offset, content)
            yield Record(offset, number, content if content.strip() else None)


def without_bom(offset: int, content: bytes) -> tuple[int, bytes]:
    """A line without the byte order mark a file may begin with."""
    if offset == 0 and content.startswith(BOM):
        return len(BOM), content[len(BOM) :]
    return offset, content


def _range(unit: Unit) -> Iterable[tuple[int, int, bytes]]:
    """The lines that begin in the unit."""
    with opened(unit.file) as stream:
        offset = unit.start
        if offset > 0:
            stream.seek(offset - 1)
            # A line that runs over from the unit before belongs there.
            offset += len(stream.readline()) - 1
        data = stream.read(max(0, unit.stop - offset))
        if data and not data.endswith(b"\n"):
            data += stream.readline()
    start = number = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield offset + start, number, data[start:end]
        start, number = end, number + 1
