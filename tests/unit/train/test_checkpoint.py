"""Checkpoints beside the steps: nothing is waited for, nothing half is ever seen, no error is lost."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ftray.core.errors import CheckpointError
from ftray.core.fs import read_json
from ftray.train import transaction
from ftray.train.checkpoint import Checkpoints, State, read_manifest


class Part:
    """A snapshot that writes one small file when it is let go."""

    layout = "test"

    def __init__(self, rank: int = 0, num_writers: int = 1, *, fails: str = "", held: bool = False) -> None:
        self.rank, self.num_writers, self.fails = rank, num_writers, fails
        self.go = threading.Event()
        if not held:
            self.go.set()

    def write(self, folder: Path) -> list[str]:
        assert self.go.wait(20)
        if self.fails:
            raise OSError(28, self.fails)
        (folder / f"part-{self.rank}").write_text(f"of rank {self.rank}")
        return [f"part-{self.rank}"]


def checkpoints(folder: Path, keep: int = 5, life: str = "one") -> Checkpoints:
    return Checkpoints(folder / "checkpoints", {"run": "x"}, keep, life)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def test_a_step_does_not_wait_and_one_is_in_flight(tmp_path: Path) -> None:
    mine, slow = checkpoints(tmp_path), Part(held=True)
    mine.commit(State(step=1), slow, 1)
    assert mine.durable is None and not mine.path(1).exists(), "it returned before anything was written"
    after: list[str] = []

    def second() -> None:
        mine.commit(State(step=2), Part(), 1)
        after.append("returned")

    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.2)
    assert not after, "the second waits for the first"
    slow.go.set()
    thread.join(20)
    assert after and mine.durable == State(step=1)
    mine.finish()
    assert mine.durable == State(step=2) and names(tmp_path) == ["step-00000001", "step-00000002"]
    assert read_manifest(mine.path(2))["files"].keys() == {"part-0"}


def test_the_same_step_is_written_once(tmp_path: Path) -> None:
    mine = checkpoints(tmp_path)
    mine.commit(State(step=3), Part(), 1)
    mine.commit(State(step=3), Part(fails="it is not asked again"), 1, wait=True)
    assert mine.durable == State(step=3)


def test_errors_surface_at_the_next_commit_or_finish(tmp_path: Path) -> None:
    mine = checkpoints(tmp_path)
    mine.commit(State(step=1), Part(fails="No space left on device"), 1)
    with pytest.raises(CheckpointError, match=r"step-00000001: .*No space left on device.*`--resume`"):
        mine.commit(State(step=2), Part(), 1)
    mine.commit(State(step=2), Part(), 1, wait=True)
    assert names(tmp_path) == ["step-00000002"], "nothing is left of the one that failed"
    mine.commit(State(step=3), Part(fails="again"), 1)
    with pytest.raises(CheckpointError, match="again"):
        mine.finish()


def test_rank_0_commits_what_all_ranks_wrote(tmp_path: Path) -> None:
    ranks = [checkpoints(tmp_path) for _ in range(3)]
    parts = [Part(rank, 2) for rank in range(3)]
    parts[1].go.clear()
    for mine, part in zip(ranks, parts, strict=True):
        mine.commit(State(step=1), part, 3)
    ranks[2].finish()  # it writes nothing
    time.sleep(0.1)
    assert not ranks[0].path(1).exists(), "one rank's part is not there yet"
    parts[1].go.set()
    for mine in ranks:
        mine.finish()
    manifest = read_manifest(ranks[0].path(1))
    assert manifest["files"].keys() == {"part-0", "part-1"} and manifest["world"] == 3
    (ranks[0].path(1) / "part-1").write_text("of another")
    with pytest.raises(CheckpointError, match="not what was committed"):
        read_manifest(ranks[0].path(1))


def test_a_rank_that_fails_fails_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [checkpoints(tmp_path) for _ in range(2)]
    ranks[0].commit(State(step=1), Part(0, 2), 2)
    ranks[1].commit(State(step=1), Part(1, 2, fails="Read-only file system"), 2)
    for mine in ranks:
        with pytest.raises(CheckpointError, match="Read-only file system"):
            mine.finish()
    assert not ranks[0].path(1).exists()
    monkeypatch.setattr(transaction, "RANKS_WAIT_S", 0.1)
    ranks[0].commit(State(step=2), Part(0, 2), 2)
    with pytest.raises(CheckpointError, match=r"rank 1 has written nothing in 0\.1 s"):
        ranks[0].finish()


def test_lives_are_kept_apart(tmp_path: Path) -> None:
    """What a killed group still writes for a step does not get into the same step of the next group."""
    old, new = checkpoints(tmp_path, life="old"), checkpoints(tmp_path, life="new")
    straggler = Part(1, 2)
    old.commit(State(step=1), straggler, 2, wait=True)
    new.commit(State(step=1), Part(0, 2), 2)
    time.sleep(0.1)
    assert not new.path(1).exists()
    other = checkpoints(tmp_path, life="new")
    other.commit(State(step=1), Part(1, 2), 2, wait=True)
    new.finish()
    assert new.newest() == new.path(1) and names(tmp_path) == ["step-00000001"], (
        "the old life's litter is gone"
    )


def test_an_older_format_is_told(tmp_path: Path) -> None:
    mine = checkpoints(tmp_path)
    mine.commit(State(step=1), Part(), 1, wait=True)
    file = mine.path(1) / "manifest.json"
    content: dict[str, Any] = read_json(file) | {"format": 1}
    from ftray.core.fs import write_json

    write_json(file, content)
    with pytest.raises(CheckpointError, match="has format 1, this version reads 2"):
        read_manifest(mine.path(1))
