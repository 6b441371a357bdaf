"""Who may ask an endpoint: keys, deltas, shares and quotas."""

import datetime
from typing import Literal, get_args

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.core.types import is_name

Scope = Literal["chat", "completions", "models", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a key may be good for."""

_SHA256 = "^[0-9a-f]{64}$"


@spec
class KeyConfig:
    """One API key, known by its digest alone."""

    sha256: str = Field(pattern=_SHA256, repr=False)
    """SHA-256 of the key in hexadecimal; the key itself is never written down."""
    expires_at: str | None = None
    """Time from which it is refused, ISO 8601 with a time zone; null: never."""
    scopes: list[Scope] = Field(default_factory=lambda: list(SCOPES), min_length=1)
    """What it is good for."""

    def __post_init__(self) -> None:
        if self.expires_at is not None:
            parse_time(self.expires_at)

    @property
    def id(self) -> str:
        """What the key is called where it must not be shown: the start of its digest."""
        return self.sha256[:12]

    @property
    def expires_at_s(self) -> float:
        """`expires_at` in seconds since 1970; infinity: never."""
        return float("inf") if self.expires_at is None else parse_time(self.expires_at).timestamp()


@spec
class TenantConfig:
    """One tenant: its keys, the deltas it may use, its share and its quotas."""

    name: str
    """The tenant's name."""
    key_sha256: str | None = Field(default=None, pattern=_SHA256, repr=False)
    """SHA-256 of a key that is good for everything and does not expire; short for `keys` with that one."""
    keys: list[KeyConfig] = Field(default_factory=list)
    """Further keys; several are good at once, so that one can take over from another."""
    deltas: list[str] = Field(default_factory=list)
    """Deltas this tenant sees besides the base: `name` (all its versions), `name@alias` or `name@3`."""
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    """Share of computed tokens while the endpoint is full, relative to other tenants'."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Most requests in a minute, over all HTTP fronts; null: no limit."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Most tokens in a minute, prompts and answers together; an answer counts with `max_tokens` until it ends."""
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    """Most requests at once, over all HTTP fronts; null: no limit."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError(
                f"name: {self.name!r} is refused; use lower-case letters, digits, `.`, `_`, `-`"
            )

    @property
    def all_keys(self) -> list[KeyConfig]:
        """Every key, whichever way it was written."""
        return [*([KeyConfig(sha256=self.key_sha256)] if self.key_sha256 else []), *self.keys]


def parse_time(text: str) -> datetime.datetime:
    """A time with its zone; raises `ConfigError`."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ConfigError(f"expires_at: {text!r} is refused; write 2026-12-31T00:00:00+00:00")
    return moment
