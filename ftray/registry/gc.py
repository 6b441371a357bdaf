"""Garbage collection: versions that nothing refers to any more.

Kept are the newest versions of a name, what an alias points at or can be rolled back to, pins, young versions,
and the parents of everything that is kept. A version is hidden first and looked for again before it goes for good,
so that a promotion or a publication that comes meanwhile is not missed.
"""

import datetime
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ftray.core.errors import RegistryError
from ftray.core.types import is_name
from ftray.registry.entry import Entry
from ftray.registry.registry import Registry

DEFAULT_KEEP = 3
DEFAULT_MIN_AGE_S = 7 * 24 * 3600.0

_Key = tuple[str, int]


@dataclass(frozen=True)
class Collection:
    """What a collection removes, or would remove, and why the rest stays."""

    removed: list[str]
    """References."""
    kept: dict[str, str]
    """Reference -> reason."""
    freed_bytes: int
    """Size of what is removed."""


def collect(
    registry: Registry,
    *,
    delete: bool = False,
    keep: int = DEFAULT_KEEP,
    min_age_s: float = DEFAULT_MIN_AGE_S,
) -> Collection:
    """Find versions that nothing refers to, and remove them if `delete` says so.

    Args:
        registry: whose versions.
        delete: remove them; otherwise they are only named.
        keep: newest versions of each name that stay, at least 1, so that numbers are never given out twice.
        min_age_s: younger versions stay.

    Raises:
        RegistryError: if a version cannot be read, for its parents are not known, or another collection runs.
    """
    if keep < 1:
        raise RegistryError(
            f"keep: {keep} is refused; the newest version of a name always stays, use at least 1"
        )
    shelf = registry.shelf
    if not delete:
        entries = _entries(registry)
        return _result(entries, _reasons(registry, entries, keep, min_age_s))
    with shelf.collecting():
        for name in filter(is_name, shelf.names()):
            shelf.sweep(name)
            for version in shelf.hidden(name):  # of a collection that was killed
                shelf.unhide(name, version)
        entries = _entries(registry)
        reasons = _reasons(registry, entries, keep, min_age_s)
        for key in entries.keys() - reasons.keys():
            shelf.hide(*key)
        visible = _entries(registry)
        found = _reasons(registry, entries | visible, keep, min_age_s)
        for key in entries.keys() - reasons.keys():
            if key in found:
                shelf.unhide(*key)
                reasons[key] = found[key]
        result = _result(entries, reasons)
        for key in entries.keys() - reasons.keys():
            shelf.remove_hidden(*key)
    return result


def _entries(registry: Registry) -> dict[_Key, Entry]:
    return {
        (name, version): registry.show(f"{name}@{version}")
        for name in registry.names()
        for version in registry.versions(name)
    }


def _reasons(
    registry: Registry, entries: Mapping[_Key, Entry], keep: int, min_age_s: float
) -> dict[_Key, str]:
    """Why versions stay; those that need not are left out."""
    now = datetime.datetime.now(datetime.UTC)
    of_name: dict[str, list[int]] = defaultdict(list)
    for name, version in sorted(entries):
        of_name[name].append(version)
    reasons: dict[_Key, str] = {}
    for name, versions in of_name.items():
        state = registry.state(name)
        reasons |= {(name, version): "newest" for version in versions[-keep:]}
        reasons |= {(name, v): "an alias, or what it can be rolled back to" for v in state.referenced()}
        reasons |= {(name, int(v)): f"pinned: {why}".rstrip(": ") for v, why in state.pins.items()}
    for key, entry in entries.items():
        if (now - datetime.datetime.fromisoformat(entry.published_at)).total_seconds() < min_age_s:
            reasons.setdefault(key, "young")
    reasons = {key: reason for key, reason in reasons.items() if key in entries}
    _keep_parents(entries, reasons)
    return reasons


def _keep_parents(entries: Mapping[_Key, Entry], reasons: dict[_Key, str]) -> None:
    named: dict[str, list[_Key]] = defaultdict(list)
    for key, entry in entries.items():
        named[entry.ref].append(key)
        named[entry.digest].append(key)
    pending = list(reasons)
    while pending:
        child = entries[pending.pop()]
        for parent in child.delta.lineage.parents:
            for key in named.get(parent, ()):
                if key not in reasons:
                    reasons[key] = f"parent of {child.ref}"
                    pending.append(key)


def _result(entries: Mapping[_Key, Entry], reasons: Mapping[_Key, str]) -> Collection:
    removed = sorted(entries.keys() - reasons.keys())
    return Collection(
        removed=[entries[key].ref for key in removed],
        kept={entries[key].ref: reasons[key] for key in sorted(reasons)},
        freed_bytes=sum(entries[key].size_bytes for key in removed),
    )
