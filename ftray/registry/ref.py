"""References to deltas, `name`, `name@3` and `name@alias`, and the names that may stand in them."""

import re
from dataclasses import dataclass

from ftray.core.errors import RegistryError
from ftray.core.types import is_name

RESERVED = frozenset({"base"})
"""Names no delta may have: an endpoint calls its base model so."""

_VERSION = re.compile(r"[1-9][0-9]{0,5}")
_RULE = "use lower-case letters, digits, `.`, `_`, `-` (64 at most)"


@dataclass(frozen=True)
class Ref:
    """A parsed reference; at most one of `version` and `alias` is set, neither means the newest version."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        selector = self.version if self.version is not None else self.alias
        return self.name if selector is None else f"{self.name}@{selector}"


def check_name(name: str) -> str:
    """Return a name a delta may have; raises `RegistryError` otherwise."""
    if not is_name(name):
        raise RegistryError(f"name {name!r} is refused; {_RULE}")
    if name in RESERVED:
        raise RegistryError(f"name {name!r} is reserved for the base model; choose another")
    return name


def check_alias(alias: str) -> str:
    """Return a word that may be an alias (a name that is no number); raises `RegistryError` otherwise."""
    if not is_name(alias) or alias.isdigit():
        raise RegistryError(f"alias {alias!r} is refused; {_RULE}, not digits alone")
    return alias


def parse_ref(text: str) -> Ref:
    """Parse `name`, `name@3` or `name@alias`; raises `RegistryError` naming what is wrong."""
    name, at, selector = text.partition("@")
    check_name(name)
    if not at:
        return Ref(name)
    if _VERSION.fullmatch(selector):
        return Ref(name, version=int(selector))
    return Ref(name, alias=check_alias(selector))
