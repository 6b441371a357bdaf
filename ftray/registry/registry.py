"""The registry of deltas: immutable `name@version`, aliases with a history, lineage; many writers, no server."""

import builtins
import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ftray.core.errors import FtrayError, RegistryError
from ftray.core.fs import read_json, sha256_file
from ftray.core.spec import dump, parse
from ftray.core.types import is_name
from ftray.data.store import is_url
from ftray.delta import manifest
from ftray.delta.parity import Parity
from ftray.registry import stage, state
from ftray.registry.entry import Entry
from ftray.registry.folder import FolderShelf
from ftray.registry.ref import check_alias, check_name, parse_ref
from ftray.registry.shelf import VERSION_FILE, Shelf
from ftray.registry.state import NameState

logger = logging.getLogger(__name__)

Stamp = tuple[int, int]
"""Newest version of a name, and the number of its newest change of aliases; (0, 0) if there is no such name."""
DEFAULT_ALIAS = "prod"

_MAX_VERSION = 999_999
_REQUESTS = 16
"""Requests at once to a remote store."""


class Registry:
    """Published deltas. Any number of processes may use it at once.

    Args:
        root: a folder, or a URL that fsspec opens (`s3://`, `gs://`, `memory://`).
    """

    def __init__(self, root: Path | str) -> None:
        text = str(root).removeprefix("file://")
        self.root: Path | str = text.rstrip("/") if is_url(text) else Path(text).expanduser()
        self.shelf = _open_shelf(self.root)

    def publish(
        self,
        folder: Path | str,
        name: str,
        *,
        metrics: Mapping[str, float] | None = None,
        lineage: Mapping[str, Any] | None = None,
        aliases: Iterable[str] = (),
        parity: Parity | None = None,
    ) -> Entry:
        """Copy a delta into the registry as the next version of a name.

        Args:
            folder: a delta folder (with `ftray_delta.json`); left as it is.
            name: name to publish under.
            metrics: measurements added to the manifest's.
            lineage: fields of `Lineage` that replace the manifest's.
            aliases: aliases to point at the new version, once it is there.
            parity: certificate that it answers alike alone, merged and served; kept with it.

        Raises:
            DeltaError: if the folder is not a whole, unharmed delta of a kind that is served, or the certificate
                does not hold.
            RegistryError: if the name or an alias is refused.
        """
        folder = Path(folder)
        check_name(name)
        wanted = [check_alias(alias) for alias in aliases]
        stage.check_source(folder)
        with self.shelf.staging(name) as staged:
            stage.fill(staged, folder, name, metrics or {}, lineage or {}, parity)
            version = self._commit(staged, name)
        if wanted:
            self._change(name, lambda now: state.promote(now, wanted, version))
        return self._entry(name, version, verify=False)

    def resolve(self, ref: str) -> Entry:
        """The version a reference (`name`, `name@3`, `name@alias`) points at, its files verified.

        Raises:
            RegistryError: for an unknown reference (with near misses) or a damaged file (by name).
        """
        return self._entry(*self._find(ref), verify=True)

    def show(self, ref: str) -> Entry:
        """As `resolve`, reading the manifest only."""
        return self._entry(*self._find(ref), verify=False)

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
        return sorted(name for name in self.shelf.names() if is_name(name) and self.versions(name))

    def versions(self, name: str) -> builtins.list[int]:
        """Committed versions of a name, ascending; empty if there is none."""
        return self.shelf.versions(check_name(name))

    def aliases(self, name: str) -> dict[str, int]:
        """Aliases of a name and the versions they point at, all of one moment."""
        return self.state(name).targets()

    def stamps(self, names: Iterable[str]) -> dict[str, Stamp]:
        """What changes when a name has a new version, or an alias of it moves: cheap enough to poll.

        No file is read, only folders are listed. While a name's stamp stays equal, so does what every reference
        to it means.
        """
        wanted = [check_name(name) for name in names]
        if isinstance(self.root, Path) or len(wanted) < 2:
            return {name: self._stamp(name) for name in wanted}
        with ThreadPoolExecutor(_REQUESTS, "ftray-registry") as pool:
            return dict(zip(wanted, pool.map(self._stamp, wanted), strict=True))

    def alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias at a version, atomically; raises `RegistryError` if there is no such version."""
        check_alias(alias)
        self._require(name, version)
        self._change(name, lambda now: state.promote(now, [alias], version))

    def promote(self, ref: str, alias: str = DEFAULT_ALIAS) -> Entry:
        """Point an alias at what a reference means now; `rollback` takes it back.

        Raises:
            RegistryError: for an unknown reference, a damaged version or a refused alias.
        """
        check_alias(alias)
        entry = self.resolve(ref)
        self.alias(entry.name, alias, entry.version)
        return self._entry(entry.name, entry.version, verify=False)

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS) -> Entry:
        """Point an alias at what it pointed at before its last promotion; again for one further back.

        Raises:
            RegistryError: if there is nothing to go back to.
        """
        check_alias(alias)
        self._require_name(check_name(name))
        now = self._change(name, lambda now: state.roll_back(now, name, alias))
        return self._entry(name, now.targets()[alias], verify=True)

    def state(self, name: str) -> NameState:
        """Aliases with their history, and pins, all of one moment."""
        return self._state(check_name(name))[1]

    def history(self, name: str) -> builtins.list[NameState]:
        """Every state of a name, oldest first: what was changed when."""
        return [self._read_state(name, number) for number in self.shelf.states(check_name(name))]

    def pin(self, ref: str, reason: str = "") -> Entry:
        """Keep a version from garbage collection until `unpin`."""
        name, version = self._find(ref)
        self._change(name, lambda now: state.pin(now, version, reason))
        return self._entry(name, version, verify=False)

    def unpin(self, ref: str) -> Entry:
        """Let go of a pinned version."""
        name, version = self._find(ref)
        self._change(name, lambda now: state.unpin(now, version))
        return self._entry(name, version, verify=False)

    def _commit(self, staged: Path, name: str) -> int:
        """Commit a staged folder under the next free number."""
        version = self._newest(name) + 1
        while version <= _MAX_VERSION:
            stage.write_record(staged, name, version)
            try:
                self.shelf.commit(staged, name, version)
            except FileExistsError:
                version += 1
            else:
                return version
        raise RegistryError(f"{name}: {_MAX_VERSION} versions are the limit; publish under another name")

    def _change(self, name: str, change: Callable[[NameState], NameState]) -> NameState:
        """Put a changed state after the newest one; whoever is second changes what the first one wrote."""
        while True:
            number, now = self._state(name)
            new = change(now)
            if new is now:
                return now
            try:
                self.shelf.add_state(name, number + 1, dump(new))
            except FileExistsError:
                continue
            # Collection hides a version and then looks for references; we refer and then look. One of us sees it.
            if gone := new.referenced() - now.referenced() - set(self.versions(name)):
                self._change(name, lambda latest: state.forget(latest, gone))
                raise RegistryError(f"{name}@{min(gone)}: no such version any more; it was collected")
            return new

    def _state(self, name: str) -> tuple[int, NameState]:
        number = max(self.shelf.states(name), default=0)
        return number, self._read_state(name, number) if number else NameState()

    def _read_state(self, name: str, number: int) -> NameState:
        try:
            return parse(NameState, self.shelf.read_state(name, number), where=f"{name}: state {number}")
        except FtrayError as error:
            raise RegistryError(f"{name}: its aliases cannot be read: {error}") from None

    def _stamp(self, name: str) -> Stamp:
        return self._newest(name), max(self.shelf.states(name), default=0)

    def _find(self, ref: str) -> tuple[str, int]:
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
        return parsed.name, version

    def _entry(self, name: str, version: int, *, verify: bool) -> Entry:
        path: Path | None = None
        try:
            path = self.shelf.open(name, version, whole=verify)
            record = read_json(path / VERSION_FILE)
            delta = manifest.read(path, verify, beside=stage.BESIDE)
            if record["manifest"] != sha256_file(path / manifest.MANIFEST):
                raise RegistryError(f"{path / manifest.MANIFEST}: its content is not what was published")
            published_at, size_bytes = str(record["published_at"]), int(record["size_bytes"])
        except (FtrayError, OSError, KeyError, TypeError) as error:
            known = isinstance(error, FtrayError)
            problem = str(error) if known else f"{path or name}/{VERSION_FILE}: not readable ({error!r})"
            raise RegistryError(f"{name}@{version} is damaged: {problem}") from None
        aliases = tuple(alias for alias, target in self.aliases(name).items() if target == version)
        return Entry(name, version, path, delta, delta.digest, published_at, size_bytes, aliases)

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


def _open_shelf(root: Path | str) -> Shelf:
    if isinstance(root, Path):
        return FolderShelf(root)
    from ftray.registry.copies import Copies
    from ftray.registry.url import UrlShelf

    return UrlShelf(root, Copies(root))


def _near(word: str, known: Iterable[str], what: str) -> str:
    known = builtins.list(known)
    if near := difflib.get_close_matches(word, known, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(near)}?"
    return f"known {what}: {', '.join(known[:10])}" if known else f"there are no {what} yet"
