"""Source files: which there are, the byte ranges they are worked on in, and their lines.

A work unit is a byte range of one file; a line belongs to the unit in which it begins. Units depend on the
file alone, never on the number of workers, so that the shards made from them do not either.
"""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftray.core.errors import DataError

UNIT_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Unit:
    """A byte range [start, stop) of a source file."""

    index: int
    """Its place among the units of the data set."""
    file: str
    """The file's path."""
    start: int
    """First byte."""
    stop: int
    """One past the last byte."""


@dataclass(frozen=True)
class Line:
    """One line that is not blank."""

    offset: int
    """Its first byte in the file."""
    number: int
    """Its number within the unit, from 0."""
    content: bytes
    """Its bytes without a byte order mark; the line end may be included."""


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files named by paths, globs and folders (their `*.jsonl`), sorted within each, none twice.

    Paths come out absolute, since work on them may start in another directory.

    Raises:
        DataError: one line, for a pattern that matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = sorted(path.glob("*.jsonl"))
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
            matches = [match for match in matches if match.is_file()]
        if not matches:
            raise DataError(f"{pattern}: no such file; check the path (a folder needs *.jsonl files in it)")
        found.update(dict.fromkeys(match.absolute() for match in matches))
    return list(found)


def split_units(files: Sequence[Path], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut files into work units of at most `unit_bytes` (a line that begins in one is read whole)."""
    ranges = [
        (str(file), start, min(start + unit_bytes, size))
        for file in files
        for size in [file.stat().st_size]
        for start in range(0, size, unit_bytes)
    ]
    return [Unit(index, *item) for index, item in enumerate(ranges)]


def read_lines(unit: Unit) -> tuple[list[Line], int]:
    """The lines that begin in a unit, and their number with the blank ones counted.

    Raises:
        DataError: if the file cannot be read.
    """
    try:
        data, skipped = _read_range(unit)
    except OSError as error:
        raise DataError(f"{unit.file}: cannot be read ({error.strerror}); check the file") from error
    lines, number = [], 0
    for offset, content in _cut(data, unit.start + skipped):
        if offset == 0 and content.startswith(_BOM):
            offset, content = len(_BOM), content[len(_BOM) :]
        if content.strip():
            lines.append(Line(offset, number, content))
        number += 1
    return lines, number


def _read_range(unit: Unit) -> tuple[bytes, int]:
    """Bytes from the first line that begins in the unit to the end of the last, and how many came before."""
    with Path(unit.file).open("rb") as file:
        skipped = 0
        if unit.start > 0:
            file.seek(unit.start - 1)
            # A line that runs over from the unit before belongs there.
            skipped = len(file.readline()) - 1
        data = file.read(max(0, unit.stop - unit.start - skipped))
        if data and not data.endswith(b"\n"):
            data += file.readline()
    return data, skipped


def _cut(data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Lines with their offsets; only `\\n` ends a line (JSON text may hold other Unicode line ends)."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield offset + start, data[start:end]
        start = end
