"""Tenants in a file: keys are made here, shown once and kept as digests alone.

The file is JSON, readable by its owner, replaced as a whole under a lock; an endpoint that names it in
`tenants_file` follows it within seconds.
"""

import builtins
import contextlib
import datetime
import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ftray.config.tenant import KeyConfig, Scope, TenantConfig
from ftray.core.errors import ConfigError, FtrayError
from ftray.core.fs import lock_file, read_json, write_json
from ftray.core.spec import dump, parse

_LOCK_S = 10.0
_KEY_BYTES = 32
"""256 bits."""


class TenantStore:
    """The tenants of a file. Raises `ConfigError` for what is not there, or there already."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def list(self) -> "builtins.list[TenantConfig]":
        """All tenants; none if there is no file yet."""
        if not self.path.exists():
            return []
        data = read_json(self.path)
        rows = data.get("tenants") if isinstance(data, dict) else None
        if not isinstance(rows, list):
            raise ConfigError(f"{self.path}: not a file of tenants; write it with `ftray tenant add`")
        return [parse(TenantConfig, row, where=str(self.path)) for row in rows]

    def stamp(self) -> tuple[int, int]:
        """What changes when the file does: cheap enough to poll."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return (0, 0)
        return (found.st_mtime_ns, found.st_ino)

    def add(self, name: str, **fields: Any) -> str:
        """Add a tenant with one key and return the key, which is stored nowhere."""
        key, config = _new_key()
        tenant = parse(TenantConfig, {"name": name, "keys": [dump(config)], **fields}, where="tenant")
        with self._changing() as tenants:
            if any(other.name == name for other in tenants):
                raise ConfigError(f"{name}: is a tenant already; `ftray tenant key` gives it another key")
            tenants.append(tenant)
        return key

    def set(self, name: str, **fields: Any) -> None:
        """Change a tenant's deltas, weight or quotas."""
        self._edit(name, lambda row: row | fields)

    def add_key(
        self, name: str, *, expires_at: datetime.datetime | None = None, scopes: Sequence[Scope] = ()
    ) -> str:
        """Give a tenant a further key and return it."""
        key, config = _new_key(expires_at, scopes)
        self._edit(name, lambda row: row | {"keys": [*row["keys"], dump(config)]})
        return key

    def rotate(self, name: str, *, grace: datetime.timedelta = datetime.timedelta()) -> str:
        """Give a tenant a new key, with the scopes of its newest one; all others end after a time of grace."""
        until = datetime.datetime.now(datetime.UTC) + grace
        made = ""

        def change(row: dict[str, Any]) -> dict[str, Any]:
            nonlocal made
            tenant = parse(TenantConfig, row)
            old = tenant.all_keys
            made, config = _new_key(None, old[-1].scopes if old else ())
            ending = [_ending(key, until) for key in old] if grace else []
            return row | {"key_sha256": None, "keys": [dump(key) for key in [*ending, config]]}

        self._edit(name, change)
        return made

    def revoke(self, name: str, key_id: str | None = None) -> None:
        """Take a key from a tenant by its id; without one, the tenant and all its keys go."""
        if key_id is None:
            with self._changing() as tenants:
                _index(tenants, name)
                tenants[:] = [tenant for tenant in tenants if tenant.name != name]
            return

        def change(row: dict[str, Any]) -> dict[str, Any]:
            keys = parse(TenantConfig, row).all_keys
            left = [key for key in keys if key.id != key_id]
            if len(left) == len(keys):
                shown = ", ".join(key.id for key in keys) or "none"
                raise ConfigError(f"{name}: has no key {key_id!r}; its keys are: {shown}")
            return row | {"key_sha256": None, "keys": [dump(key) for key in left]}

        self._edit(name, change)

    def _edit(self, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        with self._changing() as tenants:
            at = _index(tenants, name)
            tenants[at] = parse(TenantConfig, change(dump(tenants[at])), where="tenant")

    @contextlib.contextmanager
    def _changing(self) -> "Iterator[builtins.list[TenantConfig]]":
        """The tenants, to be changed in place; they are written when the block ends without an error."""
        lock = lock_file(self.path.with_name(f".{self.path.name}.lock"), _LOCK_S)
        if lock is None:
            raise FtrayError(f"{self.path}: another process has been changing it for long; try again")
        with lock:
            tenants = self.list()
            yield tenants
            write_json(self.path, {"tenants": [dump(tenant) for tenant in tenants]}, mode=0o600)


def shown(tenant: TenantConfig) -> dict[str, Any]:
    """A tenant without what its keys could be told from: ids, expiry and scopes."""
    plain: dict[str, Any] = dump(tenant)
    del plain["key_sha256"]
    plain["keys"] = [
        {"id": key.id, "expires_at": key.expires_at, "scopes": key.scopes} for key in tenant.all_keys
    ]
    return plain


def _new_key(
    expires_at: datetime.datetime | None = None, scopes: Sequence[Scope] = ()
) -> tuple[str, KeyConfig]:
    key = f"ftk-{secrets.token_urlsafe(_KEY_BYTES)}"
    fields: dict[str, Any] = {"scopes": list(scopes)} if scopes else {}
    if expires_at is not None:
        fields["expires_at"] = expires_at.isoformat(timespec="seconds")
    return key, parse(KeyConfig, {"sha256": hashlib.sha256(key.encode()).hexdigest(), **fields})


def _ending(key: KeyConfig, until: datetime.datetime) -> KeyConfig:
    soonest = min(key.expires_at_s, until.timestamp())
    moment = datetime.datetime.fromtimestamp(soonest, datetime.UTC).isoformat(timespec="seconds")
    return parse(KeyConfig, {**dump(key), "expires_at": moment})


def _index(tenants: Sequence[TenantConfig], name: str) -> int:
    for at, tenant in enumerate(tenants):
        if tenant.name == name:
            return at
    known = ", ".join(tenant.name for tenant in tenants) or "none"
    raise ConfigError(f"{name}: no such tenant; there are: {known}")
