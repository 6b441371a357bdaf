"""A registry on an object store, or whatever else fsspec opens.

    <root>/<name>/uploads/<id>/...      a delta's files and ftray_delta.json
    <root>/<name>/versions/000003.json  which upload it is, and the digest of its manifest
    <root>/<name>/versions/000003.gone  there while the version is being removed
    <root>/<name>/states/000007.json    aliases and pins

A version is there when its record is, which comes last, by a put that fails if there is one already
(`If-None-Match` on S3, `ifGenerationMatch` on GCS). A store without such a put takes one writer at a time.
"""

import contextlib
import datetime
import json
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftray.core.errors import RegistryError
from ftray.core.fs import read_json, sha256_file, write_json
from ftray.data.store import remote_errors
from ftray.delta import manifest
from ftray.registry.copies import Copies
from ftray.registry.shelf import VERSION_FILE

_STALE_AFTER = datetime.timedelta(hours=24)
_COLLECTING = "_collecting.json"
_TIME = "%Y%m%dT%H%M%S"


class UrlShelf:
    """Versions and states behind a URL.

    Args:
        url: where they are.
        copies: local copies of what was read.
    """

    def __init__(self, url: str, copies: Copies) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self._copies = copies
        try:
            # What another node has written since a folder was listed is seen.
            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise RegistryError(f"{url}: cannot be opened ({' '.join(str(error).split())})") from None

    def names(self) -> list[str]:
        """Folders below the root."""
        return self._list("")

    def versions(self, name: str) -> list[int]:
        """Numbers of the records that are not hidden."""
        found = self._list(f"{name}/versions")
        return sorted(_numbers(found, ".json") - _numbers(found, ".gone"))

    def hidden(self, name: str) -> list[int]:
        """Numbers of what is being removed."""
        return sorted(_numbers(self._list(f"{name}/versions"), ".gone"))

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A folder on this machine."""
        del name
        with tempfile.TemporaryDirectory(prefix="ftray-stage-") as tmp:
            staged = Path(tmp) / f"{datetime.datetime.now(datetime.UTC):{_TIME}}-{uuid.uuid4().hex[:12]}"
            staged.mkdir()
            yield staged

    def commit(self, staged: Path, name: str, version: int) -> None:
        """Upload the files, the first time, then put the record."""
        upload, done = staged.name, staged.with_suffix(".uploaded")
        if not done.exists():
            self._upload(staged, f"{name}/uploads/{upload}")
            done.touch()
        record = json.loads((staged / VERSION_FILE).read_text("utf-8"))
        self._create(_version(name, version), record | {"upload": upload})

    def open(self, name: str, version: int, *, whole: bool) -> Path:
        """A local copy; files that are there already are compared with their digests."""
        record = self._record(name, version)
        folder = self._copies.folder(f"{name}-{record['upload']}")
        place = f"{name}/uploads/{record['upload']}"
        if not (folder / VERSION_FILE).is_file() or read_json(folder / VERSION_FILE) != record:
            write_json(folder / VERSION_FILE, record)
        path = folder / manifest.MANIFEST
        if not path.is_file() or sha256_file(path) != record["manifest"]:
            self._fetch(f"{place}/{path.name}", path)
        if whole:
            files = manifest.read(folder, verify=False).files
            missing = {file for file, digest in files.items() if not _is_there(folder / file, digest)}
            for file in sorted(missing):
                self._fetch(f"{place}/{file}", folder / file)
            if missing:
                self._copies.make_room(keep=folder)
        return folder

    def hide(self, name: str, version: int) -> None:
        """Put the mark of removal."""
        self._put(_gone(name, version), b"{}")

    def unhide(self, name: str, version: int) -> None:
        """Remove the mark."""
        self._remove(_gone(name, version))

    def remove_hidden(self, name: str, version: int) -> None:
        """Remove the record, then the files, the mark last."""
        with contextlib.suppress(FileNotFoundError):
            upload = self._record(name, version)["upload"]
            self._remove(_version(name, version))
            self._remove(f"{name}/uploads/{upload}", recursive=True)
        self._remove(_gone(name, version))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Hold a record with a time, which another process may take over when it is old."""
        held = self._bytes(_COLLECTING)
        if held is not None and _age(held.decode(errors="replace")) > _STALE_AFTER:
            self._remove(_COLLECTING)
        try:
            self._create(_COLLECTING, f"{datetime.datetime.now(datetime.UTC):{_TIME}}-{uuid.uuid4().hex[:8]}")
        except FileExistsError:
            raise RegistryError(
                f"{self.url}: another collection is at work; if it was killed, remove {self.url}/{_COLLECTING}"
            ) from None
        try:
            yield
        finally:
            self._remove(_COLLECTING)

    def sweep(self, name: str) -> None:
        """Remove uploads that no record names, once they are too old to be at work."""
        uploads = self._list(f"{name}/uploads")
        everything = _numbers(self._list(f"{name}/versions"), ".json") if uploads else ()
        named = {self._record(name, version)["upload"] for version in everything}
        for upload in set(uploads) - named:
            if _age(upload) > _STALE_AFTER:
                self._remove(f"{name}/uploads/{upload}", recursive=True)

    def states(self, name: str) -> list[int]:
        """Numbers of the states."""
        return sorted(_numbers(self._list(f"{name}/states"), ".json"))

    def read_state(self, name: str, number: int) -> Any:
        """One state."""
        return self._read(_state(name, number))

    def add_state(self, name: str, number: int, value: Any) -> None:
        """Put a state whose number is free."""
        self._create(_state(name, number), value)

    def _record(self, name: str, version: int) -> dict[str, Any]:
        record = self._read(_version(name, version))
        if not isinstance(record, dict) or not all(
            isinstance(record.get(key), str) for key in ("upload", "manifest", "published_at")
        ):
            raise RegistryError(f"{self.url}/{_version(name, version)}: not a record of a version")
        if not record["upload"].replace("-", "").isalnum():
            raise RegistryError(f"{self.url}/{_version(name, version)}: its upload is no plain name")
        return record

    def _upload(self, staged: Path, place: str) -> None:
        for path in sorted(staged.rglob("*")):
            if path.is_file() and path.name != VERSION_FILE:
                name = f"{place}/{path.relative_to(staged).as_posix()}"
                with self._writing(name):
                    self._fs.put_file(str(path), self._path(name))

    def _create(self, name: str, value: Any) -> None:
        """Put what is not there yet; `FileExistsError` if something else is."""
        data = (json.dumps(value, indent=2) + "\n").encode()
        for attempt in range(3):
            try:
                with self._writing(name):
                    self._fs.pipe_file(self._path(name), data, mode="create")
                return
            except (FileExistsError, RegistryError) as error:
                found = self._bytes(name)
                if found == data:
                    return  # it was this put, its answer got lost and the client tried again
                if found is not None:
                    raise FileExistsError(name) from None
                if attempt == 2:
                    raise RegistryError(str(error)) from None

    def _put(self, name: str, data: bytes) -> None:
        with self._writing(name):
            self._fs.pipe_file(self._path(name), data)

    def _bytes(self, name: str) -> bytes | None:
        try:
            with self._errors(name):
                return bytes(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def _read(self, name: str) -> Any:
        data = self._bytes(name)
        if data is None:
            raise FileNotFoundError(f"{self.url}/{name}")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RegistryError(f"{self.url}/{name}: not readable as JSON ({error})") from None

    def _fetch(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex[:8]}")
        try:
            with self._errors(name):
                self._fs.get_file(self._path(name), str(tmp))
            tmp.replace(target)
        except FileNotFoundError:
            raise RegistryError(f"{self.url}/{name}: missing, though its record is there") from None
        finally:
            tmp.unlink(missing_ok=True)

    def _remove(self, name: str, *, recursive: bool = False) -> None:
        with contextlib.suppress(FileNotFoundError), self._errors(name, "cannot be removed"):
            self._fs.rm(self._path(name), recursive=recursive)

    def _list(self, name: str) -> list[str]:
        """Names directly below a folder; none if there is no such folder."""
        try:
            with self._errors(name):
                found = self._fs.ls(self._path(name), detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            with self._errors(name, "cannot be written"):
                yield
        except FileNotFoundError as error:  # making a bucket is not for us
            raise RegistryError(f"{self.url}/{name}: cannot be written ({error}); make the bucket") from None

    def _errors(self, name: str, what: str = "cannot be read") -> contextlib.AbstractContextManager[None]:
        return remote_errors(f"{self.url}/{name}", what, error=RegistryError)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")


def _version(name: str, version: int) -> str:
    return f"{name}/versions/{version:06d}.json"


def _gone(name: str, version: int) -> str:
    return f"{name}/versions/{version:06d}.gone"


def _state(name: str, number: int) -> str:
    return f"{name}/states/{number:06d}.json"


def _numbers(names: list[str], suffix: str) -> set[int]:
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return {int(stem) for stem in stems if stem.isascii() and stem.isdigit()}


def _is_there(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_file(path) == digest


def _age(upload: str) -> datetime.timedelta:
    try:
        made = datetime.datetime.strptime(upload.strip('"\n').partition("-")[0], _TIME).replace(
            tzinfo=datetime.UTC
        )
    except ValueError:
        return datetime.timedelta(0)
    return datetime.datetime.now(datetime.UTC) - made
