"""Rows of a part written out, and what a cache does not need any more."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import ConfigError, DataError
from ftray.core.spec import parse
from ftray.data.dataset import PREPARING, mark_used
from ftray.data.export import as_object, export
from ftray.data.gc import find_garbage
from ftray.data.prepare import Preparation, prepare_local
from ftray.data.read import Shards
from ftray.data.rows import parse_row

WriteRows = Callable[..., Path]
Config = Callable[..., DataConfig]
USER = {"role": "user", "content": "is 7 odd?"}
YES = {"role": "assistant", "content": "yes"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "odd", "arguments": {"n": 7}}}],
}
TOOL = {"type": "function", "function": {"name": "odd"}}


@pytest.mark.parametrize(
    "value",
    [
        {"text": "plain"},
        {"prompt": "q", "completion": "a"},
        {"messages": [USER, YES]},
        {"messages": [USER, {**YES, "weight": 0.0}, USER, {**YES, "weight": 2.5}]},
        {"messages": [USER, CALL, {"role": "tool", "content": "true"}, YES], "tools": [TOOL]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [YES], "rejected": [CALL, YES], "tools": [TOOL]},
        {"prompt": "q", "completion": "a", "label": False},
        {"instruction": "q", "output": "a", "system": "s"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_what_is_written_is_read_as_the_same_row(value: dict[str, Any]) -> None:
    row = parse_row(value)
    written = json.loads(json.dumps(as_object(row)))
    assert parse_row(written).spans == row.spans
    if not value.keys() & {"instruction", "conversations"}:
        assert written == value


def test_parts_are_written_out(
    write_rows: WriteRows, config: Config, tokenizer_folder: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"question number {i} of many: {i * 7919 % 1000}", "completion": f"{i}"}
        for i in range(200)
    ]
    split = {"type": "split", "validation": 0.2, "test": 0.3}
    data = config(write_rows(rows), transforms=["clean", "dedup", split])
    parts = {}
    for part in ("train", "validation", "test"):
        path = tmp_path / f"{part}.jsonl"
        count = export(data, tokenizer_folder, part, path)
        parts[part] = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(parts[part]) == count > 5
    assert sorted(row["completion"] for part in parts.values() for row in part) == sorted(
        r["completion"] for r in rows
    )
    for part in ("train", "validation"):
        counts = Shards(prepare_local(data, tokenizer_folder, part)).manifest["counts"]
        assert counts["documents"] == len(parts[part])
    with pytest.raises(DataError, match="no `split` with a `test` part"):
        export(config(write_rows(rows)), tokenizer_folder, "test", tmp_path / "x")


def test_what_nobody_needs_is_found(
    write_rows: WriteRows, config: Config, tokenizer_folder: str, tmp_path: Path
) -> None:
    first = Path(prepare_local(config(write_rows([{"text": "one"}])), tokenizer_folder))
    second = Path(prepare_local(config(write_rows([{"text": "two"}])), tokenizer_folder))
    third = Path(prepare_local(config(write_rows([{"text": "three"}])), tokenizer_folder))
    cache = tmp_path / "cache"
    assert find_garbage(cache, 30).datasets == [] and find_garbage(cache, 30).files == []
    run_dir = tmp_path / "runs" / "a"
    run_dir.mkdir(parents=True)
    mark_used(second, run_dir)
    old = time.time() - 40 * 86_400
    (third / "used.json").write_text(json.dumps({"at": old}))
    for folder in (first, second, third):
        used = json.loads((folder / "used.json").read_text())
        (folder / "used.json").write_text(json.dumps({**used, "at": old}))
    for path in [*cache.glob("shards/*/*"), first, second, third]:
        os.utime(path, (old, old))
    found = find_garbage(cache, 30)
    assert sorted(found.datasets) == sorted([first, third]) and found.kept == 1, "a run has used the second"
    assert len(found.files) == 4, "the shard and the record of each"
    prepare_local(config(write_rows([{"text": "one"}])), tokenizer_folder)
    found = find_garbage(cache, 30)
    assert found.datasets == [third] and len(found.files) == 2
    found.remove()
    assert not third.exists() and find_garbage(cache, 30).files == []
    assert len(Shards(second)) == 1 and len(Shards(first)) == 1
    here, now = os.uname().nodename, time.time()
    for host, pid, at, by in [
        (here, os.getpid(), now, f"process {os.getpid()}"),
        (here, 2**22 + 1, now, ""),
        ("elsewhere", 7, now - 3600, "on elsewhere, process 7"),
        ("elsewhere", 7, now - 3 * 3600, ""),
    ]:
        (first / PREPARING).write_text(json.dumps({"host": host, "pid": pid, "at": at}))
        if by:
            with pytest.raises(DataError, match=f"is being prepared .{by}.; try again"):
                find_garbage(cache, 30)
        else:
            assert find_garbage(cache, 30).kept == 2
    with pytest.raises(DataError, match="only local caches"):
        find_garbage("s3://bucket/cache", 30)


def test_what_is_not_of_a_preparation_stays(tmp_path: Path) -> None:
    strangers = [
        "train-photos/a.jpg",
        "train-0123456789abcdef/photo.jpg",
        "shards/holiday/b.jpg",
        "shards/0123456789abcdef0123/notes.json",
    ]
    old = time.time() - 90 * 86_400
    for name in [*strangers, "validation-0123456789abcdef/manifest.json", "validation-0123456789abcdef/mine"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (old, old))
        os.utime((tmp_path / name).parent, (old, old))
    found = find_garbage(tmp_path, 30)
    found.remove()
    assert [folder.name for folder in found.datasets] == ["validation-0123456789abcdef"] and not found.files
    assert all((tmp_path / name).exists() for name in [*strangers, "validation-0123456789abcdef/mine"])
    assert not (tmp_path / "validation-0123456789abcdef/manifest.json").exists()


def test_a_long_preparation_goes_on_telling(
    write_rows: WriteRows, config: Config, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftray.data.dataset._TELL_EVERY_S", 0.01)
    dataset = Preparation(config(write_rows([{"text": "one"}])), tokenizer_folder).dataset
    told = Path(dataset.folder) / PREPARING
    with dataset.preparing():
        first, end = json.loads(told.read_text())["at"], time.monotonic() + 20
        while json.loads(told.read_text())["at"] == first:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert not told.exists()


def test_a_shard_that_flipped_is_named_and_made_anew(
    write_rows: WriteRows, config: Config, tokenizer_folder: str
) -> None:
    data = config(write_rows([{"text": "one"}, {"text": "two"}]))
    folder = prepare_local(data, tokenizer_folder)
    before = Shards(folder).row(0).input_ids.tolist()
    [path] = Path(folder).parent.glob("shards/*/*.arrow")
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepare_local(data, tokenizer_folder) == folder, "neither its size nor its time tells"
    shards = Shards(folder, verify=False)
    with pytest.raises(DataError, match=f"{path.name}: its content is not what was committed; start again"):
        shards.row(0)
    assert Shards(prepare_local(data, tokenizer_folder)).row(0).input_ids.tolist() == before


def test_windows_are_dropped_behind_checkpoints_only(make_recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.drop_consumed: .* set `train\.save_steps`"):
        make_recipe(data__drop_consumed=True)
    assert parse(DataConfig, {"train": "x", "drop_consumed": True}).drop_consumed
