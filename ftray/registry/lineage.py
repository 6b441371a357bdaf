"""Where deltas come from and what came of them: parents, children, and which of them saw a source file."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ftray.core.fs import digest_file
from ftray.registry.entry import Entry
from ftray.registry.registry import Registry


@dataclass(frozen=True)
class Relative:
    """A delta that another one was made from or into."""

    ref: str
    """`name@3`, or how the child names it (a digest) if it is not published here."""
    entry: Entry | None
    """None if it is not published here."""
    steps: int
    """1 for parents and children, 2 for theirs."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"ref": self.ref, "here": self.entry is not None, "steps": self.steps}


@dataclass(frozen=True)
class Lineage:
    """One published version and its relatives."""

    entry: Entry
    ancestors: list[Relative]
    """Nearest first."""
    descendants: list[Relative]
    """Nearest first."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **self.entry.to_json(),
            "ancestors": [relative.to_json() for relative in self.ancestors],
            "descendants": [relative.to_json() for relative in self.descendants],
        }


def lineage(registry: Registry, ref: str) -> Lineage:
    """A version's relatives, both ways, as far as this registry knows.

    Raises:
        RegistryError: for an unknown reference or a damaged version.
    """
    entry = registry.show(ref)
    family = _Family(registry.list())
    return Lineage(entry, family.ancestors(entry), family.descendants(entry))


@dataclass(frozen=True)
class Witness:
    """A delta whose training data held a source file."""

    entry: Entry
    file: str
    """The file as it is named there."""
    through: str
    """The ancestor that was trained on it; empty for the delta itself."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"ref": self.entry.ref, "file": self.file, "through": self.through}


def saw(registry: Registry, source: str) -> list[Witness]:
    """Which deltas were trained on a source file, or made from one that was.

    Args:
        registry: where to look.
        source: a path or URL, the last parts of one, a digest, or a file here, which is found by its content too.
    """
    digest = digest_file(Path(source)) if Path(source).is_file() else source
    entries = registry.list()
    family = _Family(entries)
    found: dict[str, Witness] = {}
    for entry in entries:
        for file, file_digest in entry.delta.lineage.sources.items():
            if file_digest == digest or _names(source, file):
                found[entry.ref] = Witness(entry, file, "")
                break
    for own in list(found.values()):
        for relative in family.descendants(own.entry):
            if relative.entry is not None:
                found.setdefault(relative.ref, Witness(relative.entry, own.file, own.entry.ref))
    return [found[entry.ref] for entry in entries if entry.ref in found]


def _names(wanted: str, file: str) -> bool:
    """True if `wanted` is the file or the last parts of its path."""
    ours, theirs = PurePosixPath(wanted).parts, PurePosixPath(file).parts
    return bool(ours) and theirs[-len(ours) :] == ours


class _Family:
    """Entries by what their children may call them."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._by_name: dict[str, list[Entry]] = defaultdict(list)
        self._children: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            self._by_name[entry.ref].append(entry)
            self._by_name[entry.digest].append(entry)
            for parent in entry.delta.lineage.parents:
                self._children[parent].append(entry)

    def ancestors(self, entry: Entry) -> list[Relative]:
        return list(_walk(entry, self._parents))

    def descendants(self, entry: Entry) -> list[Relative]:
        return list(_walk(entry, self._offspring))

    def _parents(self, entry: Entry) -> Iterator[tuple[str, Entry | None]]:
        for name in entry.delta.lineage.parents:
            published = self._by_name.get(name, [])
            yield from ((found.ref, found) for found in published)
            if not published:
                yield name, None

    def _offspring(self, entry: Entry) -> Iterator[tuple[str, Entry | None]]:
        for name in (entry.ref, entry.digest):
            yield from ((found.ref, found) for found in self._children.get(name, []))


def _walk(entry: Entry, near: Callable[[Entry], Iterator[tuple[str, Entry | None]]]) -> Iterator[Relative]:
    """Relatives of relatives, each once."""
    seen, level, steps = {entry.ref}, [entry], 0
    while level:
        steps += 1
        found = {ref: other for one in level for ref, other in near(one) if ref not in seen}
        yield from (Relative(ref, other, steps) for ref, other in found.items())
        seen |= found.keys()
        level = [other for other in found.values() if other is not None]
