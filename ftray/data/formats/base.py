"""What all formats share: units of work, records, and opening files wherever they are.

Units and the rows in them depend on the file alone, never on the number of workers, so that the shards made from
them do not either.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ftray.core.errors import DataError
from ftray.data.spans import BadRow
from ftray.data.store import remote_errors

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_READ_BYTES = 256 << 10


@dataclass(frozen=True)
class Unit:
    """A part of a source file that is worked on at once."""

    index: int
    """Its place among the units of the data set."""
    file: str
    """The file's path or URL."""
    start: int
    """First byte (in a columnar file: of its share of the bytes)."""
    stop: int
    """One past the last byte."""
    format: str = "jsonl"
    """How it is read (`ftray.data.source.READERS`)."""
    compression: str = ""
    """`gzip`, `zstd` or none."""
    parts: tuple[int, int] | None = None
    """Row groups or record batches [first, last) of a columnar file; None: all, or no such thing."""
    take: tuple[int, ...] | None = None
    """Rows that are sampled, by their number in the unit; None: all."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row as its file gives it."""

    offset: int
    """Its first byte in the (uncompressed) file; in a columnar file its number there, from 0."""
    number: int
    """Its number within the unit, from 0: a line's, blank ones counted, or a record's."""
    value: bytes | dict[str, Any] | BadRow | None
    """JSON still to be parsed, a row, why there is none, or None for a blank line."""


class Damaged(Exception):
    """The file ends too early or is no such file from here on."""


def is_url(file: str) -> bool:
    """True for what fsspec opens and the local file system does not."""
    return "://" in file


@contextmanager
def opened(file: str) -> Iterator[Any]:
    """A file open for reading bytes.

    Raises:
        DataError: one line, if it cannot be opened or read; what is read of it may be damaged all the same.
    """
    try:
        if is_url(file):
            import fsspec

            with remote_errors(file):
                source = fsspec.open(file, "rb")
                stream = source.open()
            with stream:
                yield _Remote(file, stream)
        else:
            with Path(file).open("rb") as stream:
                yield stream
    except OSError as error:
        if is_damage(error):
            raise
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); check the file") from error


class _Remote:
    """A remote file whose failures are one line; what a decoder says of its content is not among them."""

    def __init__(self, file: str, stream: Any) -> None:
        self._file, self._stream = file, stream

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **settings: Any) -> Any:
            with remote_errors(self._file):
                return found(*arguments, **settings)

        return call


def is_damage(error: Exception) -> bool:
    """True for what a decoder says of a file's content; an error of the disk or the network has a number."""
    return isinstance(error, pa.ArrowInvalid) or (isinstance(error, OSError) and error.errno is None)


def blocks(unit: Unit) -> Iterator[bytes]:
    """The bytes of a whole file, uncompressed. Raises `Damaged` after the last that can be had."""
    if not unit.compression:
        with opened(unit.file) as stream:
            while block := stream.read(_READ_BYTES):
                yield block
        return
    total, how = 0, ""
    try:
        for block in _uncompressed(unit, 0, _READ_BYTES):
            total += len(block)
            yield block
    except OSError as error:
        if not is_damage(error):
            raise
        how = "truncated" if "truncated" in str(error).lower() else "damaged"
    if how:
        # Of the block that does not end well nothing was given; byte by byte its beginning can be had.
        try:
            yield from _uncompressed(unit, total, 1)
        except OSError as error:
            if not is_damage(error):
                raise
        raise Damaged(f"the {unit.compression} file is {how}")


def _uncompressed(unit: Unit, skipped: int, block_bytes: int) -> Iterator[bytes]:
    """Blocks of a compressed file after its first `skipped` bytes."""
    with opened(unit.file) as stream:
        source = pa.CompressedInputStream(pa.PythonFile(stream, "r"), unit.compression)
        while skipped:
            skipped -= len(source.read(min(_READ_BYTES, skipped)))
        while block := source.read(block_bytes):
            yield block


def lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their ends; only `\\n` ends one. A line that damage cuts short is not given."""
    rest: list[bytes] = []
    for piece in pieces:
        *whole, tail = piece.split(b"\n")
        for line in whole:
            rest.append(line + b"\n")
            yield b"".join(rest)
            rest = []
        if tail:
            rest.append(tail)
    if rest:
        yield b"".join(rest)


def rest_lost(offset: int, number: int, why: str) -> Record:
    """The one record that stands for everything after a damage."""
    return Record(offset, number, BadRow(f"{why}: the rest is lost after {number:,} lines, {offset:,} bytes"))
