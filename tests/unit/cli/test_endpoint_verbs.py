"""`ftray tenant`, `ftray admin` and `ftray chat` as a person types them."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftray.cli.main import main
from ftray.serve.tenant_store import TenantStore
from tests.unit.serve.conftest import serving
from tests.unit.serve.local import ADMIN, Local, Versions, local_endpoint
from tests.unit.serve.test_hot_publish import TOKEN


def ftray(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """Run one command and return what it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    return printed.out if code == 0 else printed.err


def test_tenants(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "tenants.json"
    first = ftray(capsys, "tenant", "add", file, "ann", "--delta", "a", "--tokens-per-minute", 900).strip()
    second = ftray(capsys, "tenant", "key", file, "ann", "--expires-in", "30d", "--scope", "models").strip()
    third = ftray(capsys, "tenant", "rotate", file, "ann", "--grace", "1h").strip()
    ftray(capsys, "tenant", "set", file, "ann", "--weight", 3)
    (tenant,) = TenantStore(file).list()
    assert (tenant.deltas, tenant.weight, tenant.tokens_per_minute) == (["a"], 3.0, 900)
    assert [bool(key.expires_at) for key in tenant.all_keys] == [True, True, False]
    shown = ftray(capsys, "tenant", "list", file)
    assert "ann" in shown and tenant.all_keys[0].id[:6] in shown.replace("\n", "")
    assert len({first, second, third}) == 3 and not any(key in shown for key in (first, second, third))
    ftray(capsys, "tenant", "revoke", file, "ann", tenant.all_keys[0].id)
    ftray(capsys, "tenant", "revoke", file, "ann")
    for words in (("rotate", file, "ann"), ("key", file, "ann", "--expires-in", "soon")):
        error = ftray(capsys, "tenant", *words, code=2)
        assert error.startswith("error: ") and error.count("\n") == 1


@pytest.fixture
def local(tiny_adapters: dict[str, Path], tmp_path: Path) -> Iterator[Local]:
    versions = Versions(tiny_adapters["a"], tmp_path)
    for name in ("a", "b"):
        versions.publish(name)
    with local_endpoint(versions, {"deltas": ["a"], "admin_token_sha256": TOKEN}, num_engines=1) as local:
        yield local


def test_admin(capsys: pytest.CaptureFixture[str], local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    where = ("--url", local.admin_url)
    assert "FTRAY_ADMIN_TOKEN" in ftray(capsys, "admin", "status", *where, code=2)
    monkeypatch.setenv("FTRAY_ADMIN_TOKEN", "wrong")
    assert "token" in ftray(capsys, "admin", "status", *where, code=2)
    monkeypatch.setenv("FTRAY_ADMIN_TOKEN", ADMIN)

    def served() -> set[str]:
        return {row["id"] for row in json.loads(ftray(capsys, "admin", "status", *where))["models"]}

    ftray(capsys, "admin", "load", "b@1", *where)
    local.wait(lambda: served() == {"base", "a", "b@1"})
    ftray(capsys, "admin", "unload", "b@1", *where)
    local.wait(lambda: served() == {"base", "a"})
    assert "nobody" in ftray(capsys, "admin", "load", "nobody", *where, code=2)
    ftray(capsys, "admin", "retry", *where)
    ftray(capsys, "admin", "drain", *where)
    local.wait(lambda: local.front.view.draining)


def test_chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "hi\n/model alpha\nhello [bold]\n/models\n/model nobody\nanyone?\n/quit\nnever\n"
    with serving() as server:
        seen: list[Any] = []
        add = server.engine.add
        server.engine.add = lambda request: (seen.append(bytes(request.prompt_ids).decode()), add(request))
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        main_until_exit(["chat", "--url", server.url, "--system", "be kind"])
        printed = capsys.readouterr()
    assert printed.out.splitlines()[:2] == ["Hello from base.", "Hello from alpha."]
    assert seen == ["be kind\nhi\n", "be kind\nhi\nHello from base.\nhello [bold]\n"]
    assert "does not exist" in printed.err and "beta@1" in printed.err


def main_until_exit(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
