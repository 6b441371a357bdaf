"""What a user mistypes, and what the machine refuses: one line that names it, exit code 2, no traceback."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftray.cli import main as cli
from ftray.cli.main import main
from ftray.testing.deltas import weights_delta

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; returns its one line."""

    def run(*words: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


def test_submit_with_a_name_that_is_none(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\n")
    assert "name: 'BAD NAME' is refused" in refused("submit", tmp_path / "r.yaml", "--name", "BAD NAME")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("{", "--engine: line 1 is not YAML"),
        ("a: b: c", "--engine: line 1 is not YAML"),
        ("\0", "--engine: is not YAML"),
        ("[]", "[] is not a engine"),
        ("3", "3 is not a engine"),
        ("troch", "did you mean `torch`?"),
    ],
)
def test_generate_with_an_engine_that_is_none(
    refused: Refused, tiny_base: Path, tmp_path: Path, engine: str, message: str
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    words = (tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--base", tiny_base, "--engine", engine)
    assert message in refused("generate", *words)


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("in.jsonl", "in.jsonl"),
        ("in.jsonl", "sub/../in.jsonl"),
        ("in.jsonl", "link.jsonl"),
        ("*.jsonl", "in.jsonl"),
        ("out.quarantine.jsonl", "out"),
    ],
)
def test_generate_does_not_replace_its_rows(
    refused: Refused,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    output: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in.jsonl", "out.quarantine.jsonl"):
        Path(name).write_text('{"prompt": "a"}\n')
    Path("sub").mkdir()
    Path("link.jsonl").symlink_to("in.jsonl")
    assert "would replace the rows in" in refused("generate", source, output, "--base", tiny_base)
    assert Path("in.jsonl").read_text() == Path("out.quarantine.jsonl").read_text() == '{"prompt": "a"}\n'


def test_a_file_in_a_folders_place(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "registry").write_text("")
    line = refused("publish", weights_delta(tmp_path / "delta"), "x", "--registry", tmp_path / "registry")
    assert str(tmp_path / "registry") in line and line.endswith(": Not a directory")


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails, and the error itself has no name."""
    delta = weights_delta(tmp_path / "delta")
    done = subprocess.run(
        [sys.executable, "-m", "ftray.cli.main", "publish", delta, "x", "--registry", tmp_path / "registry"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/registry/x/versions: File too large\n"


def test_what_a_worker_could_not_write(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray wraps it with the worker's whole trace."""
    from ray.exceptions import RayTaskError

    cause = PermissionError(13, "Permission denied", "/data/shard")
    wrapped = RayTaskError("f", "Traceback\n  many\n  lines", cause).as_instanceof_cause()
    assert isinstance(wrapped, OSError)

    def fail(**_: Any) -> None:
        raise wrapped

    monkeypatch.setattr(cli, "app", fail)
    assert refused("version") == "/data/shard: Permission denied"
