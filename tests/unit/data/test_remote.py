"""Shards behind a URL: the same data, read through a bounded cache of the node."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.core.spec import parse
from ftray.data import prepare
from ftray.data.cache import NodeCache
from ftray.data.grow import Background, GrowingShards
from ftray.data.prepare import Preparation, prepare_local
from ftray.data.read import Shards
from ftray.strategy.single import Single
from ftray.train.feed import Feed
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe

Make = Callable[..., DataConfig]
WriteRows = Callable[..., Path]
URL = "memory://bucket/cache"


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty bucket, small units, and a node cache of this test."""
    system = fsspec.filesystem("memory")
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)
    monkeypatch.setattr(prepare, "UNIT_BYTES", 400)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def corpus(write_rows: WriteRows) -> Path:
    return write_rows([{"text": f"number {i}"} for i in range(200)])


def test_the_rows_are_those_of_a_local_cache(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, tmp_path: Path
) -> None:
    source = corpus(write_rows)
    local = Shards(prepare_local(config(source), tokenizer_folder))
    remote = Shards(
        prepare_local(config(source, cache_dir=URL), tokenizer_folder), cache=NodeCache(tmp_path / "node")
    )
    assert str(remote.path).startswith(URL) and remote.manifest == local.manifest
    for index in range(len(local)):
        assert np.array_equal(remote.row(index).input_ids, local.row(index).input_ids)
    stamp = fsspec.filesystem("memory").modified(f"{remote.path}/manifest.json")
    prepare_local(config(source, cache_dir=URL), tokenizer_folder)
    assert fsspec.filesystem("memory").modified(f"{remote.path}/manifest.json") == stamp


def test_the_node_cache_is_bounded_and_shared(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, tmp_path: Path
) -> None:
    folder = prepare_local(config(corpus(write_rows), cache_dir=URL), tokenizer_folder)
    size = max(shard["size_bytes"] for shard in Shards(folder).shards)
    cache = NodeCache(tmp_path / "node", max_bytes=3 * size)
    shards = Shards(folder, cache=cache)
    first = shards.row(0)
    before = first.input_ids.copy()
    for index in range(len(shards)):
        shards.row(index)
        copies = list(cache.folder.iterdir())
        assert 0 < len(copies) <= 3 and sum(path.stat().st_size for path in copies) <= 3 * size
    assert np.array_equal(first.input_ids, before), "a mapped copy outlives its removal"
    again = Shards(folder, cache=cache)
    last = len(shards) - 1
    fsspec.filesystem("memory").rm("/bucket/cache/shards", recursive=True)
    assert np.array_equal(again.row(last).input_ids, shards.row(last).input_ids), "fetched once for the node"
    with pytest.raises(DataError, match="cannot be read"):
        again.row(0)


def test_a_damaged_copy_is_fetched_again(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, tmp_path: Path
) -> None:
    folder = prepare_local(config(corpus(write_rows), cache_dir=URL), tokenizer_folder)
    before = Shards(folder, cache=NodeCache(tmp_path / "node")).row(0).input_ids.tolist()
    [copy] = (tmp_path / "node").iterdir()
    whole = copy.read_bytes()
    copy.write_bytes(whole[:100] + b"?" + whole[101:])
    (tmp_path / "node" / f"{copy.name}.tmp-1").write_bytes(whole)
    os.utime(tmp_path / "node" / f"{copy.name}.tmp-1", (0, 0))
    assert Shards(folder, cache=NodeCache(tmp_path / "node")).row(0).input_ids.tolist() == before
    assert copy.read_bytes() == whole
    assert list((tmp_path / "node").iterdir()) == [copy], "what a killed process has left goes"


def test_a_damaged_remote_shard_is_named(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, tmp_path: Path
) -> None:
    data = config(corpus(write_rows), cache_dir=URL)
    folder = prepare_local(data, tokenizer_folder)
    system = fsspec.filesystem("memory")
    shards = Shards(folder, cache=NodeCache(tmp_path / "node"))
    path = f"/bucket/cache/{shards.shards[1]['file'].removeprefix('../')}"
    system.pipe_file(path, system.cat_file(path)[:-8])
    with pytest.raises(DataError, match="not what was committed"):
        shards.row(shards.shards[0]["rows"])
    with pytest.warns(UserWarning, match="preparing it again"):
        prepare_local(data, tokenizer_folder)
    shards.row(shards.shards[0]["rows"])


def test_windows_of_a_remote_data_set(write_rows: WriteRows, config: Make, tokenizer_folder: str) -> None:
    data = config(corpus(write_rows), cache_dir=URL, window_shards=2)
    background = Background(Preparation(data, tokenizer_folder))
    shards = GrowingShards(background.folder, 2)
    shards.ensure(10**9)
    background.close()
    assert shards.shards == Shards(background.folder).shards


def test_a_mixture_lets_go_of_windows(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, tmp_path: Path
) -> None:
    paths = [str(corpus(write_rows)), str(write_rows([{"text": f"other {i}"} for i in range(50)], "b.jsonl"))]
    settings = {"train": paths, "mixture": {paths[0]: 3, paths[1]: 1}, "packing": False, "window_shards": 2}
    fields = {"cache_dir": URL, "max_length": 64, "node_cache_gb": 1e-4, **settings}
    data = parse(DataConfig, fields)
    folder = prepare_local(data, tokenizer_folder)
    feed = Feed(folder, None, Single(), data, global_batch_size=8, micro_batch_size=8, seed=0)
    mapped, seen = [], []
    for step in range(25):
        seen += [int(row) for batch in feed.batches(step) for row in batch.row_ids]
        mapped.append(len(feed.shards._mapped))
    assert len(feed.shards.shards) > 10 and len(set(seen)) > 150
    assert max(mapped) <= 2 * 2 * 2, "two windows of two shards of each source at most"
    assert feed._ahead is not None, "the next windows are fetched"


@pytest.mark.parametrize("whose", ["a link", "open to others", "somebody else's"])
def test_a_node_cache_that_others_could_write_to_is_refused(
    whose: str, write_rows: WriteRows, config: Make, tokenizer_folder: str, tmp_path: Path
) -> None:
    shards = Shards(prepare_local(config(corpus(write_rows), cache_dir=URL), tokenizer_folder))
    folder = tmp_path / f"ftray-shards-{os.getuid()}"
    if whose == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir(mode=0o700)
    if whose == "open to others":
        folder.chmod(0o770)
    with pytest.MonkeyPatch.context() as patch:
        if whose == "somebody else's":
            uid = os.getuid() + 1
            patch.setattr(os, "getuid", lambda: uid)
        with pytest.raises(DataError, match="not a folder of this user alone"):
            shards.row(0)
    assert not list(folder.iterdir())
    folder.unlink() if folder.is_symlink() else folder.rmdir()
    assert len(shards.row(0).input_ids) and folder.stat().st_mode & 0o777 == 0o700


def test_what_a_killed_fetch_left_goes(tmp_path: Path, write_rows: WriteRows, config: Make) -> None:
    cache = NodeCache(tmp_path / "node", max_bytes=1000)
    cache.folder.mkdir()
    old, new, copy = (cache.folder / name for name in ("a.tmp-0", "b.tmp-0", "c"))
    for path in (old, new, copy):
        path.write_bytes(b"x" * 500)
    os.utime(old, (time.time() - 90_000,) * 2)
    cache._make_room(400)
    assert not old.exists() and new.exists() and not copy.exists(), "one under way takes room"


def test_a_run_over_remote_shards(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The next window is on the node before it is read."""
    local = make_recipe("local", data__window_shards=2)
    remote = make_recipe("remote", data__window_shards=2, data__cache_dir=URL)
    results = [train(recipe, LocalIO(tmp_path / recipe.name)) for recipe in (local, remote)]
    curves = [read_records(result.run_dir / "metrics.jsonl") for result in results]
    assert [r["loss"] for r in curves[0]] == [r["loss"] for r in curves[1]]
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
