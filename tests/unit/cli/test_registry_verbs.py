"""`publish`, `list` and `show` as a person types them."""

import json
from pathlib import Path

import pytest

from ftray.cli.main import main
from ftray.testing.deltas import weights_delta


def ftray(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run one command and return what it printed."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    recipe = {"name": "tone", "optim": {"type": "adamw", "learning_rate": 0.004}}
    lineage = {"data": ["xxh3:d0"], "parents": ["warm@1"], "run": "runs/tone"}
    return weights_delta(
        tmp_path / "run" / "delta", recipe=recipe, lineage=lineage, metrics={"eval_loss": 2.5}
    )


def test_publish_list_show(capsys: pytest.CaptureFixture[str], delta: Path, tmp_path: Path) -> None:
    where = ("--registry", tmp_path / "registry")
    assert "nothing is published here" in ftray(capsys, "list", *where)
    out = ftray(capsys, "publish", delta.parent, "tone", "--alias", "prod", "--alias", "canary", *where)
    assert "published tone@1, tone@canary, tone@prod (sha256:" in out
    ftray(capsys, "publish", delta, "tone", *where)
    out = ftray(capsys, "list", *where)
    assert "tone@1" in out and "tone@2" in out and "eval_loss 2.5" in out
    out = ftray(capsys, "show", "tone@prod", *where)
    for word in (
        "tone@1",
        "runs/tone",
        "xxh3:d0",
        "warm@1",
        "adapter_model.safetensors",
        "learning_rate: 0.004",
    ):
        assert word in out.replace("\n", " "), word


def test_json_is_machine_readable(capsys: pytest.CaptureFixture[str], delta: Path, tmp_path: Path) -> None:
    where = ("--registry", tmp_path / "registry", "--json")
    published = json.loads(ftray(capsys, "publish", delta, "tone", "--alias", "prod", *where))
    listed = json.loads(ftray(capsys, "list", *where))
    shown = json.loads(ftray(capsys, "show", "tone@prod", *where))
    assert [published] == listed == [shown]
    assert shown["ref"] == "tone@1" and shown["aliases"] == ["prod"]
    lineage = {"data": ["xxh3:d0"], "sources": {}, "parents": ["warm@1"], "run": "runs/tone", "segments": []}
    assert shown["lineage"] == lineage


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "tonne"], "error: tonne: nothing is published under this name"),
        (["show", "../x"], "error: name '../x' is refused"),
        (["publish", "nowhere", "tone"], "error: nowhere: not a delta"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--registry", str(tmp_path / "registry")])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(message) and error.count("\n") == 1


def test_show_names_a_damaged_file(capsys: pytest.CaptureFixture[str], delta: Path, tmp_path: Path) -> None:
    where = ("--registry", tmp_path / "registry")
    ftray(capsys, "publish", delta, "tone", *where)
    next(Path(tmp_path / "registry").rglob("*.safetensors")).write_bytes(b"x")
    with pytest.raises(SystemExit) as ended:
        main(["show", "tone", *map(str, where)])
    assert ended.value.code == 2 and "adapter_model.safetensors" in capsys.readouterr().err
    assert "tone@1" in ftray(capsys, "show", "tone", "--no-verify", *where)


def test_promote_and_rollback(capsys: pytest.CaptureFixture[str], delta: Path, tmp_path: Path) -> None:
    where = ("--registry", tmp_path / "registry")
    for _ in range(3):
        ftray(capsys, "publish", delta, "tone", *where)
    assert "tone@prod is now tone@1 (sha256:" in (out := ftray(capsys, "promote", "tone@1", *where))
    assert out.endswith("it was new\n")
    ftray(capsys, "promote", "tone", "--alias", "canary", *where)
    out = ftray(capsys, "promote", "tone@canary", "--alias", "prod", *where)
    assert "tone@prod is now tone@3" in out and out.endswith("it was tone@1\n")
    back = json.loads(ftray(capsys, "rollback", "tone", "--json", *where))
    assert back["ref"] == "tone@1" and back["aliases"] == ["prod"]
    with pytest.raises(SystemExit) as ended:
        main(["rollback", "tone", *map(str, where)])
    assert ended.value.code == 2 and "nothing to roll back to" in capsys.readouterr().err
