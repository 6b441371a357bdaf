"""`ftray doctor`: what this machine has."""

import json
from pathlib import Path

import pytest

from ftray.cli.main import main
from ftray.cluster.machine import inspect


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_it_says_what_there_is_and_what_would_stumble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("secret-of-the-cluster")
    token.chmod(0o644)
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    shown = run(capsys)
    assert f"others on this machine can use your clusters: `chmod 600 {token}`" in shown
    assert f"{lock} is left of a dead build; `ftray doctor --build` clears it" in shown
    assert "offline: only what is cached" in shown and "secret" not in shown
    (nodes,) = json.loads(run(capsys, "--json")).values()
    found = {finding["name"]: finding for finding in nodes}
    assert found["Ray token"]["level"] == found["build lock"]["level"] == "warning"
    assert found["torch"]["level"] == found["memory"]["level"] == "ok"
    assert {"python", "cpus", "gpus", "bfloat16", "c++", "shared memory", "open files"} <= found.keys()


def test_a_package_that_is_missing_is_an_error_only_if_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from ftray.cluster import machine

    def version(package: str) -> str:
        if package in ("torch", "deepspeed"):
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(machine, "version", version)
    levels = {finding.name: finding.level for finding in inspect()}
    assert (levels["torch"], levels["deepspeed"], levels["ray"]) == ("error", "note", "ok")
