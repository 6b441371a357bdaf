"""DeepSpeed's native operations: which lock is stale, and that nobody waits for a builder that was killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from ftray.cluster import native
from ftray.core.errors import ClusterError

_HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_is_stale_when_its_builder_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    (lock.parent / "cpu_adam.so").touch()
    builder = subprocess.Popen([sys.executable, "-c", _HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None and builder.stdout.readline() == "held\n"
    assert native.locks() == [lock]
    assert not native.is_stale(lock) and not native.is_built("cpu_adam")
    assert native.clear_stale_locks() == []
    builder.kill()
    builder.wait()
    assert native.is_stale(lock)
    assert native.clear_stale_locks() == [lock]
    assert native.locks() == [] and native.is_built("cpu_adam")


def test_a_build_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that refuses everything; the reason is in a log."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    with pytest.raises(ClusterError, match=r"cpu_adam: the build failed .*; see .*cpu_adam\.log"):
        native.build("cpu_adam")
    assert (tmp_path / "extensions" / "cpu_adam.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)  # a compiler on a busy machine
def test_what_is_built_ahead_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert not native.is_built("cpu_adam")
    assert native.build("cpu_adam")
    assert native.is_built("cpu_adam")
    library = tmp_path / "cpu_adam" / "cpu_adam.so"
    made_at = library.stat().st_mtime_ns
    assert native.compare_adam() > 0
    assert library.stat().st_mtime_ns == made_at and not native.locks()  # it was loaded, and not built again
