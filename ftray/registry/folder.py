"""A registry in a folder of the local file system, which all nodes may share.

    <root>/<name>/versions/000003/   the delta's files, ftray_delta.json and ftray_version.json
    <root>/<name>/states/000007.json aliases and pins

A version is one directory rename, so a reader sees all of it or none. A state is a link to a file that is complete.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftray.core.errors import RegistryError
from ftray.core.fs import fsync_path, lock_file, move_new, naming, read_json, write_new_json

_STALE_AFTER_S = 24 * 3600.0
_HIDDEN = ".gone-"


class FolderShelf:
    """Versions and states below a folder; links in it are never followed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Folders below the root."""
        if not self.root.is_dir():
            return []
        return [path.name for path in self.root.iterdir() if _is_real_dir(path)]

    def versions(self, name: str) -> list[int]:
        """Numbers of the committed folders."""
        folder = self._folder(name, "versions")
        names = (path.name for path in folder.iterdir() if _is_real_dir(path)) if folder.is_dir() else ()
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def hidden(self, name: str) -> list[int]:
        """Numbers of the folders that are being removed."""
        folder = self._folder(name, "versions")
        return sorted(int(path.name.removeprefix(_HIDDEN)) for path in folder.glob(f"{_HIDDEN}[0-9]*"))

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A folder beside the versions, on the same disk."""
        folder = self._made(name, "versions")
        self.sweep(name)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder, ignore_cleanup_errors=True) as tmp:
            staged = Path(tmp) / "version"
            staged.mkdir()
            with naming(folder):
                yield staged

    def commit(self, staged: Path, name: str, version: int) -> None:
        """Rename the folder to its number."""
        final = self._version(name, version)
        if final.exists() or self._hidden(name, version).exists():
            raise FileExistsError(str(final))
        move_new(staged, final)

    def open(self, name: str, version: int, *, whole: bool) -> Path:
        """The version's folder itself."""
        del whole
        path = self._version(name, version)
        if not _is_real_dir(path):
            raise FileNotFoundError(str(path))
        return path

    def hide(self, name: str, version: int) -> None:
        """Rename the folder to one that is no version."""
        self._move(self._version(name, version), self._hidden(name, version))

    def unhide(self, name: str, version: int) -> None:
        """Rename it back."""
        self._move(self._hidden(name, version), self._version(name, version))

    def remove_hidden(self, name: str, version: int) -> None:
        """Delete the folder."""
        shutil.rmtree(self._hidden(name, version), ignore_errors=True)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Hold a lock that ends with the process."""
        lock = lock_file(self.root / ".collecting", wait_s=0.0)
        if lock is None:
            raise RegistryError(f"{self.root}: another collection is at work; wait for it")
        with lock:
            yield

    def sweep(self, name: str) -> None:
        """Remove temporary folders and files of a day ago."""
        for path in (self.root / name).glob("*/.tmp-*"):
            try:
                if time.time() - path.lstat().st_mtime > _STALE_AFTER_S:
                    shutil.rmtree(path) if _is_real_dir(path) else path.unlink()
            except FileNotFoundError:  # another publisher sweeps too
                continue

    def states(self, name: str) -> list[int]:
        """Numbers of the state files."""
        folder = self._folder(name, "states")
        stems = (path.stem for path in folder.glob("[0-9]*.json")) if folder.is_dir() else ()
        return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())

    def read_state(self, name: str, number: int) -> Any:
        """One state."""
        path = self._state(name, number)
        if path.is_symlink():
            raise RegistryError(f"{path}: a link; the registry follows none, remove it")
        return read_json(path)

    def add_state(self, name: str, number: int, value: Any) -> None:
        """Write a state file whose number is free."""
        self._made(name, "states")
        write_new_json(self._state(name, number), value)

    def _folder(self, name: str, kind: str) -> Path:
        for folder in (self.root / name, self.root / name / kind):
            if folder.is_symlink():
                raise RegistryError(f"{folder}: a link; the registry follows none, remove it")
        return self.root / name / kind

    def _version(self, name: str, version: int) -> Path:
        return self._folder(name, "versions") / f"{version:06d}"

    def _hidden(self, name: str, version: int) -> Path:
        return self._folder(name, "versions") / f"{_HIDDEN}{version:06d}"

    def _state(self, name: str, number: int) -> Path:
        return self._folder(name, "states") / f"{number:06d}.json"

    def _move(self, source: Path, target: Path) -> None:
        source.rename(target)
        fsync_path(target.parent)

    def _made(self, name: str, kind: str) -> Path:
        folder = self._folder(name, kind)
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            for parent in (self.root.parent, self.root, folder.parent):
                fsync_path(parent)
        return folder


def _is_real_dir(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
