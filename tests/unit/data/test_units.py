"""What a preparation costs: only what is new, missing or damaged is worked on."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftray.config.recipe import DataConfig
from ftray.core.fs import digest_tree
from ftray.data import fingerprint, prepare, units
from ftray.data.prepare import Preparation, Stopped, prepare_local
from ftray.data.read import Shards
from ftray.data.store import each_of, open_store

Make = Callable[..., DataConfig]
WriteRows = Callable[..., Path]


@pytest.fixture
def worked_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose units are prepared, in turn; small units."""
    names: list[str] = []

    def spy(plan: units.Plan, task: units.Task) -> units.Outcome:
        names.append(Path(task.unit.file).name + ("" if task.final else " keys"))
        return units.prepare_unit(plan, task)

    monkeypatch.setattr(prepare, "UNIT_BYTES", 400)
    monkeypatch.setattr(prepare, "prepare_unit", spy)
    return names


def rows(letter: str, count: int = 30) -> list[dict[str, str]]:
    return [{"text": f"{letter} number {i}"} for i in range(count)]


def test_a_new_file_costs_only_itself(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, worked_on: list[str]
) -> None:
    folder = write_rows(rows("a"), "a.jsonl").parent
    write_rows(rows("b"), "b.jsonl")
    data = config(str(folder / "*.jsonl"))
    first = Shards(prepare_local(data, tokenizer_folder))
    assert set(worked_on) == {"a.jsonl", "b.jsonl"} and len(worked_on) == 4
    worked_on.clear()
    assert prepare_local(data, tokenizer_folder) == first.path and worked_on == []
    write_rows(rows("c"), "c.jsonl")
    more = Shards(prepare_local(data, tokenizer_folder))
    assert set(worked_on) == {"c.jsonl"}
    assert more.shards[: len(first.shards)] == first.shards and more.digest != first.digest
    assert len(more.manifest["source_counts"]) == 3
    assert more.manifest["source_counts"][2]["documents"] == 30


def test_a_barrier_s_keys_are_remembered_behind_a_url(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, worked_on: list[str]
) -> None:
    folder = write_rows(rows("b"), "b.jsonl").parent
    url = f"memory://{folder.name}/cache"
    data = config(str(folder / "*.jsonl"), transforms=["dedup"], cache_dir=url)
    prepare_local(data, tokenizer_folder)
    worked_on.clear()
    write_rows(rows("c", 3), "c.jsonl")
    prepare_local(data, tokenizer_folder)
    assert worked_on == ["c.jsonl keys", "c.jsonl"]


def test_requests_to_a_remote_store_wait_together() -> None:
    together = threading.Barrier(8)

    def ask(number: int) -> int:
        together.wait(20)
        return number

    assert list(each_of(open_store("memory://bucket/any"), ask, list(range(16)))) == list(range(16))


def test_a_barrier_s_decision_enters_the_key_of_what_it_changes(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, worked_on: list[str]
) -> None:
    folder = write_rows(rows("b"), "b.jsonl").parent
    write_rows(rows("d"), "d.jsonl")
    data = config(str(folder / "*.jsonl"), transforms=["clean", "dedup"])
    prepare_local(data, tokenizer_folder)
    worked_on.clear()
    write_rows([{"text": "new"}, *rows("b", 1)], "e.jsonl")
    prepare_local(data, tokenizer_folder)
    assert worked_on == ["e.jsonl keys", "e.jsonl"], "what stands before a new file keeps its rows"
    worked_on.clear()
    write_rows(rows("d", 1), "a.jsonl")
    shards = Shards(prepare_local(data, tokenizer_folder))
    assert worked_on == ["a.jsonl keys", "a.jsonl", "d.jsonl"], "only the unit that lost a row to it"
    assert shards.manifest["counts"]["filtered"] == {"dedup.duplicate": 2}


def test_a_stopped_preparation_goes_on(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, worked_on: list[str], tmp_path: Path
) -> None:
    data = config(write_rows(rows("a", 80)))
    preparation = Preparation(data, tokenizer_folder)
    with pytest.raises(Stopped):
        preparation.run(stop=lambda: len(worked_on) == 3)
    assert not (preparation.dataset.store.folder(preparation.dataset.name) / "manifest.json").exists()
    total = len(preparation.units)
    folder = Preparation(data, tokenizer_folder).run()
    assert len(worked_on) == total
    other = prepare_local(
        config(tmp_path / "rows.jsonl", cache_dir=str(tmp_path / "other")), tokenizer_folder
    )
    skip = frozenset({"stamps.json", "used.json"})
    assert digest_tree(folder, skip=skip) == digest_tree(other, skip=skip)


def test_kill_9_leaves_nothing_wrong(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, tmp_path: Path
) -> None:
    """The killed process' units that are whole are used; the result is that of an undisturbed one."""
    write_rows(rows("a", 4000))
    code = f"""
from ftray.config.recipe import DataConfig
from ftray.data import prepare
prepare.UNIT_BYTES = 2000
data = DataConfig(train={str(tmp_path / "rows.jsonl")!r}, cache_dir={str(tmp_path / "cache")!r}, max_length=64)
prepare.prepare_local(data, {tokenizer_folder!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    while len(list(tmp_path.glob("cache/shards/*/*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("cache/train-*/manifest.json"))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/shards/*/*.arrow")}
    prepare.UNIT_BYTES, before = 2000, prepare.UNIT_BYTES
    try:
        folder = prepare_local(config(tmp_path / "rows.jsonl"), tokenizer_folder)
        other = prepare_local(
            config(tmp_path / "rows.jsonl", cache_dir=str(tmp_path / "other")), tokenizer_folder
        )
    finally:
        prepare.UNIT_BYTES = before
    skip = frozenset({"stamps.json", "used.json"})
    assert digest_tree(folder, skip=skip) == digest_tree(other, skip=skip)
    assert sum(path.stat().st_mtime_ns == stamp for path, stamp in kept.items()) >= 5
    Shards(folder)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_shard_is_named_and_made_again(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, worked_on: list[str], damage: str
) -> None:
    data = config(write_rows(rows("a", 80)))
    folder = prepare_local(data, tokenizer_folder)
    before = digest_tree(folder.parent / "shards")
    shard = sorted(folder.parent.glob("shards/*/*.arrow"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "delete":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flip" else content[:-100])
    worked_on.clear()
    with pytest.warns(UserWarning, match=shard.name):
        assert prepare_local(data, tokenizer_folder) == folder
    assert len(worked_on) == 1
    arrows = [name for name in before if name.endswith(".arrow")]
    after = digest_tree(folder.parent / "shards")
    assert {name: after[name] for name in arrows} == {name: before[name] for name in arrows}
    Shards(folder)


def test_a_touched_shard_is_only_compared(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, worked_on: list[str]
) -> None:
    data = config(write_rows(rows("a", 80)))
    folder = prepare_local(data, tokenizer_folder)
    os.utime(next(folder.parent.glob("shards/*/*.arrow")))
    worked_on.clear()
    assert prepare_local(data, tokenizer_folder) == folder and worked_on == []


def test_an_unchanged_source_is_not_read_again(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[str] = []
    real = fingerprint.digest_file
    monkeypatch.setattr(fingerprint, "digest_file", lambda path: (digested.append(path.name), real(path))[1])
    source = write_rows(rows("a"))
    write_rows(rows("b"), "b.jsonl")
    data = config(source.parent / "*.jsonl")
    first = prepare_local(data, tokenizer_folder)
    assert sorted(digested) == ["b.jsonl", "rows.jsonl"]
    digested.clear()
    assert prepare_local(data, tokenizer_folder) == first and digested == []
    os.utime(source)
    assert prepare_local(data, tokenizer_folder) == first and digested == ["rows.jsonl"]
