"""A registry of deltas in a folder: immutable `name@version`, aliases, lineage; many writers, no server.

    <root>/<name>/versions/000003/   the delta's files, ftray_delta.json and ftray_version.json
    <root>/<name>/aliases/prod       {"version": 3}

A version is one directory rename, so a reader sees all of it or none, and of two writers that want the same
number one is told that it is taken and takes the next. Aliases are files replaced as a whole.
"""

import builtins
import datetime
import difflib
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ftray.core.errors import FtrayError, RegistryError
from ftray.core.fs import commit_dir, digest_file, fsync_path, read_json, write_json
from ftray.core.spec import dump, parse
from ftray.core.types import is_name
from ftray.delta import files as delta_files
from ftray.delta import manifest
from ftray.delta.manifest import Delta
from ftray.registry.entry import Entry
from ftray.registry.ref import check_alias, check_name, parse_ref

logger = logging.getLogger(__name__)

VERSION_FILE = "ftray_version.json"
"""Name of the record that the registry adds to a delta's files."""

_BESIDE = frozenset({VERSION_FILE})
_MAX_VERSION = 999_999
_STALE_AFTER_S = 24 * 3600.0


class Registry:
    """A folder of published deltas. Any number of processes may use it at once."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def publish(
        self,
        folder: Path | str,
        name: str,
        *,
        metrics: Mapping[str, float] | None = None,
        lineage: Mapping[str, Any] | None = None,
        aliases: Iterable[str] = (),
    ) -> Entry:
        """Copy a delta into the registry as the next version of a name.

        Args:
            folder: a delta folder (with `ftray_delta.json`); left as it is.
            name: name to publish under.
            metrics: measurements added to the manifest's.
            lineage: fields of `Lineage` that replace the manifest's.
            aliases: aliases to point at the new version, once it is there.

        Raises:
            DeltaError: if the folder is not a whole, unharmed delta.
            RegistryError: if the name or an alias is refused.
        """
        folder = Path(folder)
        check_name(name)
        wanted = [check_alias(alias) for alias in aliases]
        manifest.check_publishable(folder, manifest.read(folder, beside=_BESIDE))
        self._make_versions_folder(name)
        _sweep(self.root / name)
        version = self._newest(name) + 1
        while True:
            try:
                self._commit(folder, name, version, metrics or {}, lineage or {})
                break
            except FileExistsError:
                version += 1
        for alias in wanted:
            self.alias(name, alias, version)
        return self._entry(name, version, verify=False)

    def resolve(self, ref: str) -> Entry:
        """The version a reference (`name`, `name@3`, `name@alias`) points at, its files verified.

        Raises:
            RegistryError: for an unknown reference (with near misses) or a damaged file (by name).
        """
        return self._find(ref, verify=True)

    def show(self, ref: str) -> Entry:
        """As `resolve`, reading the manifest only."""
        return self._find(ref, verify=False)

    def list(self) -> builtins.list[Entry]:
        """All versions of all names, oldest first within a name; one that cannot be read is logged."""
        entries = []
        for name in self.names():
            for version in self.versions(name):
                try:
                    entries.append(self._entry(name, version, verify=False))
                except FtrayError as error:
                    logger.warning("left out of the list: %s", error)
        return entries

    def names(self) -> builtins.list[str]:
        """Names with at least one version, sorted."""
        if not self.root.is_dir():
            return []
        found = [path.name for path in self.root.iterdir() if is_name(path.name) and _is_real_dir(path)]
        return sorted(name for name in found if self.versions(name))

    def versions(self, name: str) -> builtins.list[int]:
        """Committed versions of a name, ascending; empty if there is none."""
        folder = self._versions_folder(check_name(name))
        if not _is_real_dir(folder):
            return []
        names = (path.name for path in folder.iterdir() if _is_real_dir(path))
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def aliases(self, name: str) -> dict[str, int]:
        """Aliases of a name and the versions they point at."""
        folder = self.root / check_name(name) / "aliases"
        if not _is_real_dir(folder):
            return {}
        found = sorted(path for path in folder.iterdir() if is_name(path.name))
        return {path.name: _read_alias(path) for path in found}

    def alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias at a version, atomically; raises `RegistryError` if there is no such version."""
        check_alias(alias)
        self._require(name, version)
        path = self.root / name / "aliases" / alias
        if path.is_symlink():
            raise RegistryError(f"{path}: a link; remove it and set the alias again")
        write_json(path, {"version": version})

    def _find(self, ref: str, *, verify: bool) -> Entry:
        parsed = parse_ref(ref)
        self._require_name(parsed.name)
        version = parsed.version
        if parsed.alias is not None:
            known = self.aliases(parsed.name)
            if parsed.alias not in known:
                hint = _near(parsed.alias, known, f"aliases of {parsed.name}")
                raise RegistryError(f"{ref}: no such alias; {hint}")
            version = known[parsed.alias]
        if version is None:
            version = self._newest(parsed.name)
        self._require(parsed.name, version)
        return self._entry(parsed.name, version, verify=verify)

    def _entry(self, name: str, version: int, *, verify: bool) -> Entry:
        path = self._version_folder(name, version)
        try:
            record = read_json(path / VERSION_FILE)
            delta = manifest.read(path, verify, beside=_BESIDE)
            if record["manifest"] != digest_file(path / manifest.MANIFEST):
                raise RegistryError(f"{path / manifest.MANIFEST}: its content is not what was published")
            published_at = str(record["published_at"])
        except (FtrayError, OSError, KeyError, TypeError) as error:
            known = isinstance(error, FtrayError)
            problem = str(error) if known else f"{path / VERSION_FILE}: not readable ({error!r})"
            raise RegistryError(f"{name}@{version} is damaged: {problem}") from None
        aliases = tuple(alias for alias, target in self.aliases(name).items() if target == version)
        return Entry(name, version, path, delta, delta.digest, published_at, aliases)

    def _commit(
        self, source: Path, name: str, version: int, metrics: Mapping[str, float], lineage: Mapping[str, Any]
    ) -> None:
        """Commit one version; raises `FileExistsError` if the number is taken."""
        if version > _MAX_VERSION:
            raise RegistryError(f"{name}: {_MAX_VERSION} versions are the limit; publish under another name")
        final = self._version_folder(name, version)
        if final.exists():
            raise FileExistsError(str(final))
        with commit_dir(final) as tmp:
            for file in delta_files.list_files(source, skip=_BESIDE):
                _copy(source / file, tmp / file)
            # The copy is what gets checked, so nobody can change the files between the check and the commit.
            delta = manifest.read(tmp)
            manifest.check_publishable(tmp, delta)
            merged = dump(delta)
            merged["metrics"] |= dict(metrics)
            merged["lineage"] |= dict(lineage)
            write_json(tmp / manifest.MANIFEST, dump(parse(Delta, merged, where=f"{name}@{version}")))
            record = {
                "name": name,
                "version": version,
                "published_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "manifest": digest_file(tmp / manifest.MANIFEST),
            }
            write_json(tmp / VERSION_FILE, record)

    def _newest(self, name: str) -> int:
        return max(self.versions(name), default=0)

    def _require_name(self, name: str) -> None:
        if not self.versions(name):
            hint = _near(name, self.names(), "names")
            raise RegistryError(f"{name}: nothing is published under this name in {self.root}; {hint}")

    def _require(self, name: str, version: int) -> None:
        self._require_name(name)
        if version not in (known := self.versions(name)):
            shown = ", ".join(str(number) for number in known[-5:])
            raise RegistryError(f"{name}@{version}: no such version; the newest are: {shown}")

    def _versions_folder(self, name: str) -> Path:
        for folder in (self.root / name, self.root / name / "versions"):
            if folder.is_symlink():
                raise RegistryError(f"{folder}: a link; the registry follows none, remove it")
        return self.root / name / "versions"

    def _version_folder(self, name: str, version: int) -> Path:
        return self._versions_folder(name) / f"{version:06d}"

    def _make_versions_folder(self, name: str) -> Path:
        folder = self._versions_folder(name)
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            for parent in (self.root.parent, self.root, folder.parent):
                fsync_path(parent)
        return folder


def _near(word: str, known: Iterable[str], what: str) -> str:
    known = builtins.list(known)
    if near := difflib.get_close_matches(word, known, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(near)}?"
    return f"known {what}: {', '.join(known[:10])}" if known else f"there are no {what} yet"


def _is_real_dir(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _read_alias(path: Path) -> int:
    if path.is_symlink():
        raise RegistryError(f"{path}: a link; remove it and set the alias again")
    try:
        version = read_json(path)["version"]
    except (FtrayError, TypeError, KeyError):
        version = None
    if not isinstance(version, int):
        raise RegistryError(f"{path}: not an alias file; set the alias again")
    return version


def _copy(source: Path, target: Path) -> None:
    """Copy a regular file, refusing a link put in its place after the folder was listed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as reader, target.open("xb") as writer:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RegistryError(f"{source}: not a plain file")
        shutil.copyfileobj(reader, writer, 1 << 22)


def _sweep(folder: Path) -> None:
    """Remove what publishers of a name that were killed left behind, once it is too old to be at work."""
    for path in folder.glob("*/.tmp-*"):
        try:
            if time.time() - path.lstat().st_mtime > _STALE_AFTER_S:
                shutil.rmtree(path) if _is_real_dir(path) else path.unlink()
        except FileNotFoundError:  # another publisher sweeps too
            continue
