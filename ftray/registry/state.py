"""Aliases and pins of a name: immutable numbered records, of which the newest one holds.

A record is the whole state, so whoever reads one sees all aliases as they were at one moment. An alias keeps the
versions it has pointed at, so a rollback goes back to exactly the one before and a second one further.
"""

import datetime
from collections.abc import Collection, Iterable
from dataclasses import replace

from pydantic import Field

from ftray.core.errors import RegistryError
from ftray.core.spec import spec

MAX_BACK = 16
"""Steps an alias can be rolled back; what lies further back is forgotten and may be collected."""


@spec
class NameState:
    """Aliases and pins of one name."""

    at: str = ""
    """When it was written, UTC, ISO 8601."""
    change: str = ""
    """What was done, for people: `promote prod 3`."""
    aliases: dict[str, list[int]] = Field(default_factory=dict)
    """Versions each alias has pointed at, the one it points at now last."""
    pins: dict[str, str] = Field(default_factory=dict)
    """Versions that are kept whatever happens -> why."""

    def targets(self) -> dict[str, int]:
        """What each alias points at now."""
        return {alias: stack[-1] for alias, stack in sorted(self.aliases.items()) if stack}

    def referenced(self) -> set[int]:
        """Versions that an alias, a rollback or a pin needs."""
        return {version for stack in self.aliases.values() for version in stack} | set(map(int, self.pins))


def promote(state: NameState, aliases: Iterable[str], version: int) -> NameState:
    """Point aliases at a version; one that does already stays as it is."""
    moved = [alias for alias in aliases if state.targets().get(alias) != version]
    if not moved:
        return state
    stacks = {alias: [*state.aliases.get(alias, []), version][-MAX_BACK - 1 :] for alias in moved}
    return _changed(state, f"promote {' '.join(moved)} {version}", aliases=state.aliases | stacks)


def roll_back(state: NameState, name: str, alias: str) -> NameState:
    """Point an alias at what it pointed at before; raises `RegistryError` if that was nothing."""
    stack = state.aliases.get(alias, [])
    if len(stack) < 2:
        now = f"has pointed at version {stack[0]} only" if stack else "does not exist"
        raise RegistryError(f"{name}@{alias}: {now}; there is nothing to roll back to")
    change = f"rollback {alias} {stack[-1]} -> {stack[-2]}"
    return _changed(state, change, aliases=state.aliases | {alias: stack[:-1]})


def pin(state: NameState, version: int, reason: str) -> NameState:
    """Keep a version whatever happens; `reason` is for people."""
    return _changed(state, f"pin {version}", pins=state.pins | {str(version): reason})


def unpin(state: NameState, version: int) -> NameState:
    """Let go of a pinned version."""
    left = {key: reason for key, reason in state.pins.items() if key != str(version)}
    return state if left == state.pins else _changed(state, f"unpin {version}", pins=left)


def forget(state: NameState, versions: Collection[int]) -> NameState:
    """Take versions that are gone out of everything that refers to them."""
    stacks = {alias: [v for v in stack if v not in versions] for alias, stack in state.aliases.items()}
    pins = {key: reason for key, reason in state.pins.items() if int(key) not in versions}
    left = {alias: stack for alias, stack in stacks.items() if stack}
    return _changed(state, f"forget {' '.join(map(str, sorted(versions)))}", aliases=left, pins=pins)


def _changed(state: NameState, change: str, **fields: object) -> NameState:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return replace(state, at=now, change=change, **fields)  # type: ignore[arg-type]
