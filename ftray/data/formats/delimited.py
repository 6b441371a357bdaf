"""Comma- and tab-separated files with a header line. A row may span lines, so a file is one unit."""

import csv
import re
from collections.abc import Iterator
from typing import Any

from ftray.data.formats.base import Damaged, Record, Unit, rest_lost
from ftray.data.formats.text import whole_lines, without_bom
from ftray.data.spans import BadRow

# Half of a surrogate pair stands for a byte that is no UTF-8; none can come from valid UTF-8.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_MAX_CELL_CHARS = 1 << 30


def read_csv(unit: Unit) -> Iterator[Record]:
    """Rows of comma-separated cells."""
    return _rows(unit, ",")


def read_tsv(unit: Unit) -> Iterator[Record]:
    """Rows of tab-separated cells."""
    return _rows(unit, "\t")


class _Lines:
    """Lines for the parser, which takes several at once for a row with line ends in its cells."""

    def __init__(self, unit: Unit) -> None:
        self._found = whole_lines(unit)
        self.offset = 0
        """Where the next line begins."""
        self.damage: Damaged | None = None

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        offset, _, content = next(self._found)
        if isinstance(content, Damaged):
            self.damage = content
            raise StopIteration
        self.offset = offset + len(content)
        return without_bom(offset, content)[1].decode("utf-8", "surrogateescape")


def _rows(unit: Unit, delimiter: str) -> Iterator[Record]:
    # The limit is the process's; the standard one refuses cells of 128 KiB.
    csv.field_size_limit(_MAX_CELL_CHARS)
    source = _Lines(unit)
    parser = csv.reader(source, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        offset = source.offset
        try:
            cells = next(parser)
        except StopIteration:
            break
        except csv.Error as error:
            if source.damage is None:
                ended = "end of data" in str(error)
                why = "a quote is not closed, the rest is lost" if ended else f"not CSV: {error}"
                yield Record(offset, number, BadRow(why))
                number += 1
                continue
            break
        if not cells:  # a blank line
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                yield Record(offset, number, BadRow("a column's name stands twice in the header"))
                return
        else:
            yield Record(offset, number, _row(header, cells))
            number += 1
    if source.damage is not None:
        yield rest_lost(offset, number, str(source.damage))


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"{'more' if len(cells) > len(header) else 'fewer'} cells than the header has columns")
    if any(_NOT_UTF8.search(cell) for cell in cells):
        return BadRow("not UTF-8")
    return dict(zip(header, cells, strict=True))
