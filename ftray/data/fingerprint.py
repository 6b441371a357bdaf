"""What a source file holds, without reading it twice: digests remembered by size and time of change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftray.core.errors import DataError
from ftray.core.fs import digest_file, digest_json
from ftray.data.store import Folder, Store, is_url, remote_errors

_MEMORY = "digests.json"
_VERSIONS = ("ETag", "etag", "blob_id", "generation", "mtime", "LastModified", "last_modified", "created")
"""What tells one content of a remote file from another, by file system; the surest first."""


def fingerprints(files: Sequence[Folder], store: Store) -> list[dict[str, Any]]:
    """File, size and digest of each source file.

    A local file is digested when its size or its time of change is not what was remembered. A remote one is
    never read for this: its digest is that of its URL, size and etag (or time).

    Raises:
        DataError: one line, if a file cannot be read.
    """
    known: dict[str, Any] = store.read_json(_MEMORY) or {}
    found = [_remote(str(file)) if is_url(file) else _local(Path(file), known) for file in files]
    news = {entry["file"]: entry.pop("news") for entry in found if "news" in entry}
    if news:
        # Two preparations at once may forget what the other has learnt; it is learnt again.
        store.write_json(_MEMORY, {**(store.read_json(_MEMORY) or {}), **news})
    return found


def _local(file: Path, known: dict[str, Any]) -> dict[str, Any]:
    try:
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry: dict[str, Any] = {"file": str(file), "size_bytes": stat.st_size}
        remembered = known.get(str(file))
        if isinstance(remembered, dict) and remembered.get("stamp") == stamp:
            return {**entry, "digest": remembered["digest"]}
        digest = digest_file(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the file") from None
    return {**entry, "digest": digest, "news": {"stamp": stamp, "digest": digest}}


def _remote(url: str) -> dict[str, Any]:
    import fsspec

    try:
        with remote_errors(url):
            system, path = fsspec.core.url_to_fs(url)
            info = system.info(path)
    except FileNotFoundError:
        raise DataError(f"{url}: is not there any more; check the URL") from None
    version = next((info[name] for name in _VERSIONS if info.get(name)), None)
    identity = {"url": url, "size_bytes": info["size"], "version": str(version)}
    return {"file": url, "size_bytes": info["size"], "digest": digest_json(identity)}
