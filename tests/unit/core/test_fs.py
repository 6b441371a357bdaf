"""Files are wholly there or not there, whatever line a kill falls on."""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ftray.core import fs
from ftray.core.errors import CheckpointError, FtrayError

CONTENT = {"a.txt": b"a" * 1000, "deep/b.bin": bytes(range(256)) * 100}


def _write(folder: Path) -> None:
    for name, data in CONTENT.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _commit(final: Path) -> None:
    with fs.commit_dir(final) as tmp:
        _write(tmp)


def _killed_at_line(action: Callable[[], None], line: int) -> bool:
    """Run an action in a child that is killed at its n-th line inside `fs`; True if it got that far."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.WIFSIGNALED(status)
    seen = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != fs.__file__:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    action()
    os._exit(0)


def test_a_kill_at_any_line_leaves_all_or_nothing(tmp_path: Path) -> None:
    committed = []
    for line in range(1, 200):
        final = tmp_path / str(line) / "final"
        killed = _killed_at_line(lambda final=final: _commit(final), line)  # type: ignore[misc]
        if final.exists():
            assert fs.digest_tree(final) == {name: fs.digest_bytes(data) for name, data in CONTENT.items()}
        else:
            _commit(final)  # what a kill left behind is in nobody's way
        committed.append(killed)
        if not killed:
            break
    assert committed.count(True) > 15 and committed[-1] is False


def test_a_kill_at_any_line_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    found = set()
    for line in range(1, 100):
        fs.write_json(path, {"value": "old"})
        killed = _killed_at_line(lambda: fs.write_json(path, {"value": "new"}), line)
        found.add(json.loads(path.read_text())["value"])
        if not killed:
            break
    assert found == {"old", "new"}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), fs.commit_dir(tmp_path / "final") as tmp:
        _write(tmp)
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_committed_folder_is_never_replaced(tmp_path: Path) -> None:
    _commit(tmp_path / "final")
    before = fs.digest_tree(tmp_path / "final")
    with pytest.raises(FileExistsError), fs.commit_dir(tmp_path / "final") as tmp:
        (tmp / "other").write_text("x")
    assert fs.digest_tree(tmp_path / "final") == before
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_one_of_many_writers_wins(tmp_path: Path) -> None:
    results: list[str] = []
    gate = threading.Barrier(8)

    def write(number: int) -> None:
        try:
            with fs.commit_dir(tmp_path / "final") as tmp:
                (tmp / "who").write_text(str(number))
                gate.wait()
            results.append("won")
        except FileExistsError:
            results.append("lost")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["lost"] * 7 + ["won"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["who"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    _write(tmp_path)
    digests = fs.digest_tree(tmp_path)
    fs.verify_tree(tmp_path, digests)
    victim = tmp_path / "deep" / "b.bin"
    data = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif damage == "truncate":
        victim.write_bytes(data[:-1])
    elif damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(CONTENT["a.txt"])
    with pytest.raises(CheckpointError, match=r"b\.bin") as raised:
        fs.verify_tree(tmp_path, digests)
    assert "\n" not in str(raised.value)


def test_digests_depend_on_content_only() -> None:
    assert fs.digest_json({"b": 1, "a": "é"}) == fs.digest_json(json.loads('{"a": "\\u00e9", "b": 1}'))
    assert fs.digest_json({"a": 1}) != fs.digest_json({"a": 2})
    assert fs.digest_bytes(b"").startswith("xxh3:") and len(fs.digest_bytes(b"")) == 37


def test_a_large_file_is_digested_in_pieces(tmp_path: Path) -> None:
    data = os.urandom((1 << 22) + 17)
    (tmp_path / "large").write_bytes(data)
    assert fs.digest_file(tmp_path / "large") == fs.digest_bytes(data)
    digest = fs.sha256_file(tmp_path / "large")
    assert digest == "sha256:" + hashlib.sha256(data).hexdigest()
    fs.verify_tree(tmp_path, {"large": digest})
    (tmp_path / "large").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="large"):
        fs.verify_tree(tmp_path, {"large": digest})


def test_json_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"a": \n1')
    for name in ("bad.json", "missing.json"):
        with pytest.raises(FtrayError, match=name) as raised:
            fs.read_json(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_an_error_without_a_file_names_the_one_that_was_written(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, fs.commit_dir(tmp_path / "final"):
        raise OSError(28, "No space left on device")
    assert raised.value.filename == str(tmp_path / "final")
    with pytest.raises(OSError, match="a message of its own"), fs.commit_dir(tmp_path / "final"):
        raise OSError("a message of its own")
