"""What a cache of prepared data holds that nobody needs any more.

A data set is needed while a run's folder is there that has used it, or while it was used not long ago. A file of
the shards is needed while a data set that stays names it, or while it is young. While a preparation is running
nothing is removed at all.
"""

import json
import os
import posixpath
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftray.core.errors import DataError, FtrayError
from ftray.core.fs import read_json
from ftray.data.dataset import PREPARING, STALE_S, USED
from ftray.data.read import MANIFEST, record_of
from ftray.data.store import Folder, is_url

_DAY_S = 86_400.0
# Only what preparation has made is ever removed, whatever else is in the folder.
_DATASET = re.compile(r"(train|validation)-[0-9a-f]{16}")
_DATASET_FILE = re.compile(
    r"(manifest|stamps|preparing|used|reader|failed|window-\d+-\d+)\.json|quarantine\.jsonl|lengths\.png|\.tmp-.+"
)
_SOURCE = re.compile(r"[0-9a-f]{20}")
_UNIT_FILE = re.compile(r"[0-9a-f]{20}\.(\d+\.arrow|arrow|json|keys)|\.tmp-[0-9a-f]{20}\..+")


@dataclass
class Garbage:
    """What can be removed."""

    datasets: list[Path] = field(default_factory=list)
    """Folders of data sets."""
    files: list[Path] = field(default_factory=list)
    """Files of units that no data set names."""
    kept: int = 0
    """Data sets that stay."""
    size_bytes: int = 0
    """Bytes of all that can be removed."""

    def remove(self) -> None:
        """Remove it."""
        made = [path for folder in self.datasets for path in _made(folder)]
        for path in [*made, *self.files]:
            path.unlink(missing_ok=True)
        for folder in {*self.datasets, *(path.parent for path in self.files)}:
            if not any(folder.iterdir()):
                folder.rmdir()


def find_garbage(cache_dir: Folder, days: float) -> Garbage:
    """What in a cache has not been used for some days and is no run's.

    Args:
        cache_dir: `data.cache_dir` of the recipes that share it; a local folder.
        days: how long what is unused stays.

    Raises:
        DataError: one line, if there is no such folder, or a preparation is running in it.
    """
    if is_url(cache_dir):
        raise DataError(
            f"{cache_dir}: only local caches are looked through; use the store's own lifecycle rules"
        )
    root, before = Path(cache_dir).expanduser(), time.time() - days * _DAY_S
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name the `data.cache_dir` of your recipes")
    found, named = Garbage(), set[Path]()
    for folder in sorted(root.glob("*-*/")):
        if not _DATASET.fullmatch(folder.name) or not any(_made(folder)):
            continue
        if (why := _running(folder / PREPARING)) is not None:
            raise DataError(f"{folder}: is being prepared ({why}); try again when that is done")
        if _is_needed(folder, before):
            found.kept += 1
            named |= set(_named(folder))
        else:
            found.datasets.append(folder)
            found.size_bytes += sum(path.stat().st_size for path in _made(folder))
    for path in sorted((root / "shards").glob("*/*")):
        if not _SOURCE.fullmatch(path.parent.name) or not _UNIT_FILE.fullmatch(path.name):
            continue
        if _record(path) not in named and path.stat().st_mtime < before:
            found.files.append(path)
            found.size_bytes += path.stat().st_size
    return found


def _made(folder: Path) -> Iterator[Path]:
    """The files of a data set that preparation (or `ftray data stats`) has made."""
    return (path for path in folder.iterdir() if _DATASET_FILE.fullmatch(path.name) and path.is_file())


def _is_needed(folder: Path, before: float) -> bool:
    used = _json(folder / USED) or {}
    if any(Path(run).exists() for run in used.get("runs", [])):
        return True
    return max(float(used.get("at", 0)), folder.stat().st_mtime) >= before


def _named(folder: Path) -> Iterator[Path]:
    """What is remembered of the units whose shards a data set names."""
    for path in [folder / MANIFEST, *folder.glob("window-*.json")]:
        for shard in (_json(path) or {}).get("shards", []):
            yield _record(Path(posixpath.normpath(folder / shard["file"])))


def _record(path: Path) -> Path:
    """The record of the unit that a file of the shards belongs to."""
    return Path(record_of(str(path)))


def _running(path: Path) -> str | None:
    """Who prepares a data set, or None; what a process left behind that is no more does not count."""
    told = _json(path)
    if told is None or time.time() - told["at"] > STALE_S:
        return None
    if told["host"] != socket.gethostname():
        return f"on {told['host']}, process {told['pid']}"
    try:
        os.kill(told["pid"], 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return f"process {told['pid']}"


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (FtrayError, json.JSONDecodeError):
        return None
