"""Which files a path, glob, folder, URL or Hub id names."""

import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.core.errors import DataError
from ftray.data.formats.base import COMPRESSIONS, is_url

_TABLES = (".jsonl", ".ndjson", ".json", ".parquet", ".pq", ".arrow", ".csv", ".tsv")
_TEXTS = (".txt", ".md")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files in which `datasets` describes a data set."""
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(\w+))?")
"""`owner/name`, and a split behind a colon."""
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Found:
    """A file that is there."""

    file: str
    """Its absolute path or its URL."""
    size_bytes: int
    """Its size."""


def list_files(place: str) -> list[Found]:
    """The files that one source names, sorted.

    Of a folder's files (hidden ones apart, subfolders included) those of tables are taken, and plain text only
    where there are none, since a README often lies beside the data. A folder that `datasets` saved is read as such.

    Raises:
        DataError: one line, if nothing is there or it cannot be listed.
    """
    if "\0" in place:
        raise DataError(f"{place!r}: no such file; a path holds no NUL")
    system, path = _system(place)
    try:
        system.invalidate_cache()  # files may have come since this process listed them last
        found = _in(system, path, place)
    except DataError:
        raise
    except Exception as error:  # what a file system of another package raises is its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{place}: cannot be listed ({reason}); check the path and your access") from error
    if not found and (match := _HUB_ID.fullmatch(place)) and _suffix(place) not in (*_TABLES, *_TEXTS):
        from ftray.data.hub import hub_files

        return [Found(file, Path(file).stat().st_size) for file in hub_files(match[1], match[2] or "train")]
    if not found:
        kinds = ", ".join((*_TABLES, *_TEXTS))
        raise DataError(f"{place}: no such file; check the path (a folder needs files in it: {kinds})")
    return found


def _system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a place, and the path there."""
    import fsspec

    local = place if is_url(place) else str(Path(place).expanduser().absolute())
    try:
        system, path = fsspec.core.url_to_fs(local)
    except ImportError as error:
        scheme = place.partition(":")[0]
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(scheme)
        how = f"pip install {package}" if package else " ".join(str(error).split())
        raise DataError(f"{place}: what opens `{scheme}://` is not installed; {how}") from None
    except ValueError as error:
        raise DataError(f"{place}: no such kind of URL ({error})") from None
    return system, path


def _in(system: Any, path: str, place: str) -> list[Found]:
    scheme = f"{place.partition('://')[0]}://" if is_url(place) else ""
    if system.isfile(path):
        return _with_sizes(system, [path], scheme)
    if system.isdir(path):
        return _with_sizes(system, _of_folder(system, path, place), scheme)
    if not _GLOB.search(path):
        return []
    return _with_sizes(system, [match for match in system.glob(path) if system.isfile(match)], scheme)


def _of_folder(system: Any, path: str, place: str) -> list[str]:
    if system.isfile(posixpath.join(path, "dataset_dict.json")):
        splits = json.loads(system.cat_file(posixpath.join(path, "dataset_dict.json"))).get("splits", [])
        raise DataError(
            f"{place}: holds the splits {', '.join(splits)}; name one, as {posixpath.join(place, splits[0])}"
        )
    state = posixpath.join(path, "state.json")
    if system.isfile(state):
        listed = json.loads(system.cat_file(state)).get("_data_files")
        if listed:
            return [posixpath.join(path, item["filename"]) for item in listed]
    names = [name for name in system.find(path) if not _is_hidden(posixpath.relpath(name, path))]
    tables = [name for name in names if _suffix(name) in _TABLES and posixpath.basename(name) not in _ABOUT]
    return sorted(tables or [name for name in names if _suffix(name) in _TEXTS])


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _suffix(name: str) -> str:
    stem, suffix = posixpath.splitext(posixpath.basename(name).lower())
    return posixpath.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def _with_sizes(system: Any, names: Iterable[str], scheme: str) -> list[Found]:
    found = []
    for name in names:
        file, size = scheme + name.removeprefix(scheme), system.size(name)
        if size is None:
            raise DataError(f"{file}: its server does not say how long it is; copy it to a disk or a store")
        found.append(Found(file, int(size)))
    return found
