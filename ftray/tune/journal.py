"""The journal of a search: append-only, checked, with one writer. What it holds has happened.

A line is `crc32 json`: eight hexadecimal digits, a space, compact JSON, a newline. One write and one fsync
append it. A driver killed in a write leaves a last line without its end, which the next driver cuts off; any
other damage cannot come from that and stops the search.
"""

import fcntl
import json
import os
import re
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ftray.core.errors import TuneError
from ftray.core.fs import fsync_path

Record = dict[str, Any]


def encode(record: Record) -> bytes:
    """One line of the journal."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode(line: bytes) -> Record | None:
    """The record of one line, or None if the line is torn or damaged."""
    checksum, space, body = line[:8], line[8:9], line[9:-1]
    if line[-1:] != b"\n" or space != b" " or checksum != b"%08x" % zlib.crc32(body):
        return None
    record = json.loads(body)
    assert isinstance(record, dict)
    return record


def read(path: Path) -> list[Record]:
    """The records of a journal, without the lock and without mending it.

    Raises:
        TuneError: if there is no journal, or a whole line of it is damaged.
    """
    try:
        return _parse(path.read_bytes(), path)[0]
    except FileNotFoundError:
        raise TuneError(f"{path}: no such journal; name the folder of a search") from None


class Journal:
    """The journal, opened by its only writer.

    Args:
        path: the file; made if it is missing.

    Raises:
        TuneError: if another driver holds it, or a whole line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            data = path.read_bytes()
            self.records, size = _parse(data, path)
            self.torn_bytes = len(data) - size
            if self.torn_bytes:
                os.ftruncate(self._fd, size)
                os.fsync(self._fd)
            fsync_path(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns.

        Raises:
            TuneError: if the disk takes no more; the journal is then as it was.
        """
        line, size = encode(record), os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            if written == len(line):
                os.fsync(self._fd)
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        else:
            reason = "the disk is full"
        if written != len(line):
            # A torn line must not stay, or the next record would stand behind damage.
            os.ftruncate(self._fd, size)
            raise TuneError(
                f"{self.path}: cannot be written ({reason}); make room and run the same command with --resume"
            )
        self.records.append(record)

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TuneError(
                f"{self.path}: another driver is writing this search; wait for it or stop it"
            ) from None


def _parse(data: bytes, path: Path) -> tuple[list[Record], int]:
    """The records and the number of good bytes."""
    records: list[Record] = []
    size = 0
    lines = re.findall(rb"[^\n]*\n|[^\n]+$", data)
    for number, line in enumerate(lines, start=1):
        record = decode(line)
        if record is None:
            if line.endswith(b"\n"):
                raise TuneError(f"{path}: line {number} is damaged; restore the journal from a copy")
            break
        records.append(record)
        size += len(line)
    return records, size
