"""Copies of remote shards on this node's disk, bounded in size, shared by the processes of the node."""

import contextlib
import os
import tempfile
import time
import uuid
from pathlib import Path

from ftray.core.errors import DataError
from ftray.core.fs import digest_file, fsync_path, lock_file, private_dir
from ftray.data.store import Store

_WAIT_S = 600.0


class NodeCache:
    """Files named by their digests; the ones used longest ago go first.

    A file that a process has mapped stays readable after it is removed, so eviction asks nobody.

    Args:
        folder: where the copies are, this user's alone; default: `ftray-shards-<uid>` in the temporary folder.
        max_bytes: size of all copies together; a single file may be larger.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = 20 << 30) -> None:
        self.folder = folder or Path(tempfile.gettempdir()) / f"ftray-shards-{os.getuid()}"
        self.max_bytes = max_bytes
        self._good: set[str] = set()

    def get(self, store: Store, name: str, digest: str, size_bytes: int) -> Path:
        """A local copy of a file of the store.

        Raises:
            DataError: one line, if it cannot be read or is not what the digest says, or if somebody else could
                have written the copy.
        """
        private_dir(self.folder, DataError)
        path = self.folder / digest.removeprefix("xxh3:")
        if self._touch(path) and self._is_good(path, digest):
            return path
        # One process of the node fetches, the others find the copy.
        lock = lock_file(path.with_suffix(".lock"), _WAIT_S)
        try:
            if not self._touch(path):
                self._make_room(size_bytes)
                self._fetch(store, name, digest, path)
        finally:
            if lock is not None:
                lock.close()
            path.with_suffix(".lock").unlink(missing_ok=True)
        return path

    def _fetch(self, store: Store, name: str, digest: str, path: Path) -> None:
        tmp = path.with_suffix(f".tmp-{uuid.uuid4().hex[:8]}")
        try:
            store.fetch(name, tmp)
            if digest_file(tmp) != digest:
                raise DataError(
                    f"{store.folder(name)}: its content is not what was committed; "
                    "delete it and prepare the data again"
                )
            fsync_path(tmp)
            tmp.replace(path)
            self._good.add(path.name)
        finally:
            tmp.unlink(missing_ok=True)

    def _is_good(self, path: Path, digest: str) -> bool:
        """Compare a copy that is there already, once in a process; a damaged one is removed."""
        if path.name not in self._good:
            try:
                if digest_file(path) != digest:
                    path.unlink(missing_ok=True)
                    return False
            except FileNotFoundError:  # another process has just made room
                return False
            self._good.add(path.name)
        return True

    def _touch(self, path: Path) -> bool:
        """Mark a copy as used now; False if there is none."""
        try:
            os.utime(path, (time.time(), time.time()))
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size_bytes: int) -> None:
        copies = []
        for path in self.folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix.startswith(".tmp-") and stat.st_mtime < time.time() - _WAIT_S:
                    path.unlink()  # of a process that was killed
                elif path.suffix.startswith(".tmp-"):
                    size_bytes += stat.st_size
                elif not path.suffix:
                    copies.append((stat.st_mtime, stat.st_size, path))
        room = self.max_bytes - size_bytes - sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if room >= 0:
                break
            path.unlink(missing_ok=True)
            room += size
