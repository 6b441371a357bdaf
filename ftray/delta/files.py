"""Which files a delta may hold: names and types from an allow-list, nothing executable, no links.

A delta may come from another tenant, so its folder is untrusted input: weights are safetensors, settings are
JSON, and whatever could run code when it is opened (a pickle, a custom-code hook) is refused by name.
"""

import json
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any

from ftray.core.errors import DeltaError

SUFFIXES = frozenset({".safetensors", ".json", ".md", ".jinja", ".yaml", ".png", ".txt", ".model"})
"""File types a delta may hold (`.model`: a SentencePiece vocabulary, which tokenizers save; it is plain data)."""

_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format itself


def check_relative_name(name: str) -> None:
    """Refuse a file name that is not a plain relative POSIX path of an allowed type (`DeltaError`)."""
    parts = name.split("/")
    if not all(_COMPONENT.fullmatch(part) for part in parts):
        raise DeltaError(f"{name!r}: not a file name for a delta; use letters, digits, `.`, `_`, `-`, `/`")
    if Path(name).suffix not in SUFFIXES:
        allowed = ", ".join(sorted(SUFFIXES))
        raise DeltaError(f"{name!r}: a delta may not hold this type of file; remove it (allowed: {allowed})")


def list_files(folder: Path, *, skip: frozenset[str] = frozenset()) -> list[str]:
    """Relative POSIX names of all files below a folder, sorted.

    Args:
        folder: the delta folder.
        skip: names left out.

    Raises:
        DeltaError: for a link, a device, or a name or type that is not allowed.
    """
    names: list[str] = []
    pending = [""]
    while pending:
        below = pending.pop()
        for path in (folder / below).iterdir():
            name = f"{below}{path.name}"
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                pending.append(name + "/")
            elif not stat.S_ISREG(mode):
                raise DeltaError(f"{path}: a link or device; a delta holds plain files only")
            elif name not in skip:
                names.append(name)
    for name in names:
        check_relative_name(name)
    return sorted(names)


def check_contents(folder: Path, names: list[str]) -> None:
    """Check that weights are safetensors and JSON is JSON without custom-code hooks (`DeltaError`)."""
    for name in names:
        if name.endswith(".safetensors"):
            safetensors_header(folder / name)
        elif name.endswith(".json"):
            _check_json(folder / name)


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, offsets (bytes into the data).

    Raises:
        DeltaError: if the file is not safetensors or is cut short.
    """
    problem = f"{path}: not a safetensors file; save the weights with `safetensors`"
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise DeltaError(problem)
        (header_bytes,) = struct.unpack("<Q", prefix)
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise DeltaError(problem)
        try:
            header: dict[str, Any] = json.loads(file.read(header_bytes))
            ends = [item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"]
            data_bytes = max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise DeltaError(problem) from None
    if not isinstance(data_bytes, int):
        raise DeltaError(problem)
    if 8 + header_bytes + data_bytes != size_bytes:
        raise DeltaError(f"{path}: its length is not what its header says; copy it again")
    return header


def _check_json(path: Path) -> None:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"{path}: not JSON ({error})") from None
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if "auto_map" in item:
                raise DeltaError(f"{path}: `auto_map` asks for code to be run on load; remove it")
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
