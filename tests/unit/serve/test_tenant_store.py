"""Keys are made, shown once, rotated and revoked; nothing that is stored or shown can be used as one."""

import base64
import datetime
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ftray.core.errors import ConfigError, RequestError
from ftray.serve.tenant_store import TenantStore, shown
from ftray.serve.tenants import Access

from .conftest import MODELS


@pytest.fixture
def store(tmp_path: Path) -> TenantStore:
    return TenantStore(tmp_path / "tenants.json")


def allowed(store: TenantStore, key: str, scope: str = "chat") -> bool:
    access = Access(store.list(), MODELS, keys=True)
    try:
        access.authenticate(f"Bearer {key}", scope)  # type: ignore[arg-type]
    except RequestError as error:
        assert error.status in (401, 403)
        return False
    return True


def test_a_key_is_long_and_stored_nowhere(store: TenantStore) -> None:
    keys = [store.add(name, deltas=["alpha"], weight=2.0) for name in ("ann", "bob")]
    keys += [store.add_key("ann"), store.rotate("bob")]
    dump = (
        store.path.read_text() + json.dumps([shown(tenant) for tenant in store.list()]) + repr(store.list())
    )
    for key in keys:
        secret = key.removeprefix("ftk-")
        assert len(base64.urlsafe_b64decode(secret + "=")) == 32  # 256 bits
        assert secret not in dump
    digests = [key.sha256 for tenant in store.list() for key in tenant.all_keys]
    public = json.dumps([shown(tenant) for tenant in store.list()])
    assert not any(digest in public for digest in digests)
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_keys_have_scopes_and_an_end(store: TenantStore) -> None:
    store.add("ann")
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
    reader = store.add_key("ann", scopes=["models", "metrics"])
    assert allowed(store, reader, "models") and not allowed(store, reader, "chat")
    assert not allowed(store, store.add_key("ann", expires_at=past))
    assert allowed(store, store.add_key("ann", expires_at=past + datetime.timedelta(days=1)))


def test_a_rotated_key_ends_at_once_or_after_a_grace(store: TenantStore) -> None:
    first = store.add("ann")
    second = store.rotate("ann", grace=datetime.timedelta(hours=1))
    assert allowed(store, first) and allowed(store, second)
    third = store.rotate("ann")
    assert [allowed(store, key) for key in (first, second, third)] == [False, False, True]


def test_keys_and_tenants_are_revoked(store: TenantStore) -> None:
    first, second = store.add("ann"), store.add_key("ann")
    store.revoke("ann", store.list()[0].all_keys[0].id)
    assert not allowed(store, first) and allowed(store, second)
    with pytest.raises(ConfigError, match="no key 'nope'"):
        store.revoke("ann", "nope")
    store.revoke("ann")
    assert store.list() == [] and not allowed(store, second)


def test_mistakes_are_named(store: TenantStore) -> None:
    store.add("ann")
    for wrong in (
        lambda: store.add("ann"),
        lambda: store.add("A b"),
        lambda: store.add("bob", weight=-1),
        lambda: store.set("ann", tokens_per_minute=0),
        lambda: store.rotate("nobody"),
    ):
        with pytest.raises(ConfigError) as caught:
            wrong()
        assert "\n" not in str(caught.value)
    assert [tenant.name for tenant in store.list()] == ["ann"]


def test_several_processes_may_change_it(store: TenantStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: TenantStore(store.path).add(f"t{n}"), range(16)))
    assert len(store.list()) == 16
