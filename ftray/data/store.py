"""Where prepared data are kept: a folder, or any URL that fsspec opens (`s3://`, `gs://`, `memory://`).

Names are relative POSIX paths. A file is there wholly or not at all: on a disk by temp + fsync + rename, on an
object store by its one put. Readers trust only what a manifest names and digests confirm.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ftray.core.errors import DataError, FtrayError
from ftray.core.fs import read_json, replace_file, write_json

Folder = Path | str
"""A folder of the local file system, or an fsspec URL."""
_In = TypeVar("_In")
_Out = TypeVar("_Out")
_REQUESTS, _BATCH = 16, 1024
"""Requests at once to a remote store, and those whose answers may wait to be taken."""
Stamp = list[Any]
"""What changes when a file does, without reading it: its size, and its time or etag."""


class Store(Protocol):
    """Files below one root."""

    def folder(self, name: str) -> Folder:
        """Where `name` is, as a user would write it."""
        ...

    def read_json(self, name: str) -> Any:
        """A JSON file's value, or None if it is not there (or is damaged, which is as good as absent)."""
        ...

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file atomically."""
        ...

    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to write to; it becomes `name` when the block ends without an error."""
        ...

    def stamp(self, name: str) -> Stamp | None:
        """The file's stamp, or None if there is no such file."""
        ...

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to a local path. Raises `DataError` if it cannot be read."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        ...


def is_url(location: Folder) -> bool:
    """True for what fsspec opens and the local file system does not."""
    return "://" in str(location)


def open_store(location: Folder) -> Store:
    """The store at a folder or URL. Raises `DataError` if the URL's scheme needs what is not installed."""
    local = str(location).removeprefix("file://")
    return RemoteStore(local) if is_url(local) else LocalStore(Path(local).expanduser())


def each_of(store: Store, work: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
    """Do what waits for a store with each item, in order: many at once where it is remote."""
    if isinstance(store, LocalStore) or len(items) < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(_REQUESTS, "ftray-store") as pool:
        for start in range(0, len(items), _BATCH):
            yield from pool.map(work, items[start : start + _BATCH])


def split_folder(folder: Folder) -> tuple[Folder, str]:
    """A folder's parent and its name in it."""
    if not is_url(folder):
        path = Path(folder).expanduser().absolute()
        return path.parent, path.name
    parent, _, name = str(folder).rstrip("/").rpartition("/")
    return parent, name


@contextlib.contextmanager
def remote_errors(
    where: Folder, what: str = "cannot be read", error: type[FtrayError] = DataError
) -> Iterator[None]:
    """Turns whatever a client of a remote store raises, of kinds of its own, into one line.

    Raises:
        FileNotFoundError, FileExistsError: as they are.
        error: for anything else.
    """
    try:
        yield
    except (FtrayError, FileNotFoundError, FileExistsError):
        raise
    except Exception as cause:
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise error(f"{where}: {what} ({reason}); check the URL, your access and the network") from cause


class LocalStore:
    """A folder of the local file system (which all nodes may share)."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def folder(self, name: str) -> Path:
        """The path of `name`."""
        return self.root / name

    def read_json(self, name: str) -> Any:
        """A JSON file's value, or None."""
        try:
            return read_json(self.root / name)
        except FtrayError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file atomically and durably."""
        write_json(self.root / name, value)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path on the same disk that is renamed to `name`."""
        with replace_file(self.root / name) as tmp:
            yield tmp

    def stamp(self, name: str) -> Stamp | None:
        """Size and time of the last change."""
        try:
            found = (self.root / name).stat()
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns]

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file; readers map it where it is instead."""
        target.write_bytes((self.root / name).read_bytes())

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        (self.root / name).unlink(missing_ok=True)


class RemoteStore:
    """A folder behind an fsspec URL."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            # What another node has written since a folder was listed is seen.
            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise DataError(f"{url}: cannot be opened ({' '.join(str(error).split())})") from None

    def __reduce__(self) -> tuple[type["RemoteStore"], tuple[str]]:
        return RemoteStore, (self.url,)

    def folder(self, name: str) -> str:
        """The URL of `name`."""
        return f"{self.url}/{name}"

    def read_json(self, name: str) -> Any:
        """A JSON file's value, or None."""
        try:
            with remote_errors(self.folder(name)):
                content = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        try:
            return json.loads(content)
        except ValueError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Put a JSON file."""
        with self.writing(name) as path:
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary local file that is uploaded as `name`."""
        with tempfile.TemporaryDirectory(prefix="ftray-put-") as folder:
            tmp = Path(folder) / "file"
            yield tmp
            try:
                with remote_errors(self.folder(name), "cannot be written"):
                    # Makes folders where there are such; making a bucket is not for us.
                    self._fs.put_file(str(tmp), self._path(name))
            except FileNotFoundError as error:
                raise DataError(
                    f"{self.folder(name)}: cannot be written ({error}); make the bucket"
                ) from None

    def stamp(self, name: str) -> Stamp | None:
        """Size, and the etag or time where the store has one."""
        try:
            with remote_errors(self.folder(name)):
                info = self._fs.info(self._path(name))
        except FileNotFoundError:
            return None
        return [info["size"], str(info.get("ETag") or info.get("etag") or info.get("mtime") or "")]

    def fetch(self, name: str, target: Path) -> None:
        """Download a file."""
        try:
            with remote_errors(self.folder(name)):
                self._fs.get_file(self._path(name), str(target))
        except FileNotFoundError:
            raise DataError(
                f"{self.folder(name)}: cannot be read (it is not there any more); prepare the data again"
            ) from None

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with (
            contextlib.suppress(FileNotFoundError),
            remote_errors(self.folder(name), "cannot be removed"),
        ):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
