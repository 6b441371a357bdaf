"""Local copies of what lies in a remote registry, bounded in size, shared by the processes of a node."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from ftray.core.errors import RegistryError
from ftray.core.fs import private_dir

_IN_USE_S = 3600.0


class Copies:
    """A folder of versions; those used longest ago go first, none that was used in the last hour.

    Args:
        url: the registry they are of.
        max_bytes: size of all of them together.
    """

    def __init__(self, url: str, max_bytes: int = 20 << 30) -> None:
        of_url = hashlib.sha256(url.encode()).hexdigest()[:32]
        self._own = Path(tempfile.gettempdir()) / f"ftray-copies-{os.getuid()}"
        self.root = self._own / of_url
        self.max_bytes = max_bytes

    def folder(self, name: str) -> Path:
        """The folder of one version, made when needed; it counts as used now.

        Raises:
            RegistryError: if somebody else could have written there.
        """
        private_dir(self._own, RegistryError)
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.utime(path)
        return path

    def make_room(self, keep: Path) -> None:
        """Remove old copies until the rest fits."""
        found = []
        for path in self.root.iterdir():
            with contextlib.suppress(FileNotFoundError):
                size = sum(file.lstat().st_size for file in path.rglob("*"))
                found.append((path.stat().st_mtime, size, path))
        room = self.max_bytes - sum(size for _, size, _ in found)
        for used_at, size, path in sorted(found):
            if room >= 0 or used_at > time.time() - _IN_USE_S:
                return
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)
                room += size
