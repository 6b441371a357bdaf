"""A delta sent as an archive, unpacked without trusting it.

Only plain files with allowed names and types come out, each counted as it is written: what an archive says of its
own sizes is not believed. Zip only: the headers of a tar are themselves data of any size.
"""

import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ftray.core.errors import DeltaError
from ftray.delta.files import check_relative_name

_BLOCK = 1 << 20
_SMALL = 1 << 16
"""Archives up to this size count as so large, for a few settings may shrink much."""
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    ValueError,
)


@dataclass(frozen=True)
class Limits:
    """What an upload may be."""

    max_bytes: int = 20 << 30
    """All files together, unpacked."""
    max_members: int = 256
    """Files."""
    max_ratio: float = 100.0
    """Unpacked to packed size; weights hardly shrink, so more is a bomb."""


def unpack(archive: Path, into: Path, limits: Limits | None = None) -> Path:
    """Unpack a zip archive.

    Args:
        archive: the file that was sent.
        into: an empty folder to write to.
        limits: what is allowed.

    Returns:
        The delta's folder: `into`, or the one folder that everything in it lies in.

    Raises:
        DeltaError: one line naming the member that is refused, or the limit.
    """
    limits = limits or Limits()
    room = min(limits.max_bytes, int(limits.max_ratio * max(archive.stat().st_size, _SMALL)))
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            if len(members) > limits.max_members:
                raise DeltaError(f"more than {limits.max_members} files; a delta has a few")
            for member in members:
                _check(member)
            for member in members:
                if not member.is_dir():
                    with opened.open(member) as file:
                        room -= _write(file, into / member.filename, room)
    except DeltaError as error:
        raise DeltaError(f"{archive.name}: {error}") from None
    except _UNREADABLE as error:
        raise DeltaError(f"{archive.name}: not a readable zip archive ({error}); pack it again") from None
    found = list(into.iterdir())
    return found[0] if len(found) == 1 and found[0].is_dir() else into


def _check(member: zipfile.ZipInfo) -> None:
    mode = stat.S_IFMT(member.external_attr >> 16)
    # `orig_filename` still has what follows a NUL, and backslashes.
    name = member.orig_filename
    check_relative_name(f"{name}folder.json" if member.is_dir() else name)
    if mode not in (0, stat.S_IFREG, stat.S_IFDIR) or (mode == stat.S_IFDIR) != (
        member.is_dir() and mode != 0
    ):
        raise DeltaError(f"{name}: a link or device; a delta holds plain files only")
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DeltaError(f"{name}: encrypted, or packed in another way than deflate; pack it again")


def _write(file: IO[bytes], target: Path, room: int) -> int:
    """Write one member; returns its size in bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    try:
        with target.open("xb") as out:
            while block := file.read(_BLOCK):
                written += len(block)
                if written > room:
                    raise DeltaError(f"{target.name}: unpacks to more than is allowed; a bomb, or no delta")
                out.write(block)
    except FileExistsError:
        raise DeltaError(f"{target.name}: is in it twice; pack it again") from None
    return written
