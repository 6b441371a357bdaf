"""Sources and shards in an S3 bucket, over HTTP, against moto's server on the loopback."""

import gzip
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.data import prepare
from ftray.data.cache import NodeCache
from ftray.data.grow import Background, GrowingShards
from ftray.data.prepare import Preparation, prepare_local
from ftray.data.read import Shards
from tests.buckets import empty_bucket

Make = Callable[..., DataConfig]
ROWS = [{"prompt": f"q{i}", "completion": "word " * (i % 5 + 1)} for i in range(90)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[s3fs.S3FileSystem]:
    """An empty bucket `corpora`."""
    monkeypatch.setattr(prepare, "UNIT_BYTES", 900)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with empty_bucket(endpoint, "corpora", monkeypatch) as system:
        yield system


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (folder / "a.jsonl").write_text(lines + "\n{broken")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "c.parquet", row_group_size=40)
    return folder


def put(bucket: s3fs.S3FileSystem, folder: Path) -> None:
    for path in folder.iterdir():
        bucket.put_file(str(path), f"corpora/source/{path.name}")


def changes(bucket: s3fs.S3FileSystem) -> dict[str, Any]:
    return {name: info["LastModified"] for name, info in bucket.find("corpora/cache", detail=True).items()}


def test_shards_are_those_of_local_files(
    bucket: s3fs.S3FileSystem, tmp_path: Path, config: Make, tokenizer_folder: str
) -> None:
    folder = write_corpus(tmp_path / "corpus")
    put(bucket, folder)
    local = Shards(prepare_local(config(folder), tokenizer_folder))
    data = config("s3://corpora/source", cache_dir="s3://corpora/cache")
    cache = NodeCache(tmp_path / "node", max_bytes=max(shard["size_bytes"] for shard in local.shards))
    remote = Shards(prepare_local(data, tokenizer_folder), cache=cache)
    assert str(remote.path).startswith("s3://corpora/cache/train-") and len(remote.shards) == 8
    assert [shard["digest"] for shard in remote.shards] == [shard["digest"] for shard in local.shards]
    assert remote.manifest["counts"] == local.manifest["counts"]
    for index in range(len(local)):
        assert np.array_equal(remote.row(index).input_ids, local.row(index).input_ids)
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.max_bytes
    bad = json.loads(bucket.cat_file(f"{remote.path}/quarantine.jsonl"))
    assert (bad["file"], bad["line"]) == ("s3://corpora/source/a.jsonl", 91)


def test_only_what_is_new_is_made(
    bucket: s3fs.S3FileSystem, tmp_path: Path, config: Make, tokenizer_folder: str
) -> None:
    put(bucket, write_corpus(tmp_path / "corpus"))
    data = config("s3://corpora/source/*", cache_dir="s3://corpora/cache")
    first = prepare_local(data, tokenizer_folder)
    before = changes(bucket)
    assert prepare_local(data, tokenizer_folder) == first
    assert {name for name, at in changes(bucket).items() if before[name] != at} <= {
        f"{str(first).removeprefix('s3://')}/used.json"
    }
    bucket.pipe_file("corpora/source/d.jsonl", b'{"text": "new"}\n')
    more = Shards(prepare_local(data, tokenizer_folder))
    assert len(more.manifest["sources"]) == 4, "found by a process that has listed the folder before"
    made = [name for name in changes(bucket) if name not in before and name.endswith(".arrow")]
    assert len(made) == 1 and made[0].endswith(more.shards[-1]["file"].removeprefix(".."))


def test_a_damaged_shard_is_named_and_made_again(
    bucket: s3fs.S3FileSystem, tmp_path: Path, config: Make, tokenizer_folder: str
) -> None:
    put(bucket, write_corpus(tmp_path / "corpus"))
    data = config("s3://corpora/source", cache_dir="s3://corpora/cache")
    shards = Shards(prepare_local(data, tokenizer_folder), cache=NodeCache(tmp_path / "node"))
    path = f"corpora/cache/{shards.shards[0]['file'].removeprefix('../')}"
    bucket.pipe_file(path, bucket.cat_file(path)[:-8])
    with pytest.raises(DataError, match=f"s3://{path}: its content is not what was committed"):
        shards.row(0)
    with pytest.warns(UserWarning, match=f"s3://{path}: missing or not what was written"):
        prepare_local(data, tokenizer_folder)
    assert len(shards.row(0).input_ids)


def test_two_preparations_at_once_make_one_data_set(
    bucket: s3fs.S3FileSystem, tmp_path: Path, config: Make, tokenizer_folder: str
) -> None:
    """No put has to be conditional: whoever comes last puts the same bytes; a reader may follow meanwhile."""
    put(bucket, write_corpus(tmp_path / "corpus"))
    data = config("s3://corpora/source", cache_dir="s3://corpora/cache", window_shards=2)
    background = Background(Preparation(data, tokenizer_folder))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(prepare_local, data, tokenizer_folder)
        growing = GrowingShards(background.folder, 2)
        growing.ensure(10**9)
        folder = second.result()
    background.close()
    assert folder == background.folder
    assert Shards(folder).shards == growing.shards


def test_what_cannot_be_reached_is_one_line(
    bucket: s3fs.S3FileSystem, tmp_path: Path, config: Make, tokenizer_folder: str
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"^s3://nobody/[^\n]*cannot be written[^\n]*$"):
        prepare_local(config(source, cache_dir="s3://nobody/cache"), tokenizer_folder)
    assert not bucket.exists("nobody"), "a bucket is not made for a misspelt name"
    with pytest.raises(DataError, match=r"^s3://corpora/none/\*\.jsonl: no such file[^\n]*$"):
        prepare_local(config("s3://corpora/none/*.jsonl"), tokenizer_folder)
