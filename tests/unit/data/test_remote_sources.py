"""Sources at URLs are prepared as local ones are."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.data.prepare import Preparation, prepare_local
from ftray.data.read import Shards
from ftray.data.source import find_sources

ROWS = [{"prompt": f"q{i}", "completion": "word " * (i % 5 + 1)} for i in range(90)]


@pytest.fixture
def remote() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.mkdirs("/remote-sources", exist_ok=True)
    yield system
    system.rm("/remote-sources", recursive=True)


def test_shards_of_remote_files_are_those_of_local_ones(
    tmp_path: Path, remote: Any, config: Callable[..., DataConfig], tokenizer_folder: str
) -> None:
    local = tmp_path / "corpus"
    local.mkdir()
    table = pa.Table.from_pylist(ROWS)
    (local / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n{broken")
    with pa.OSFile(str(local / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    pq.write_table(table, local / "c.parquet", row_group_size=40)
    for path in local.iterdir():
        remote.put_file(str(path), f"/remote-sources/{path.name}")
    here = prepare_local(config(local, max_quarantine=0.1), tokenizer_folder)
    there = prepare_local(config("memory://remote-sources", max_quarantine=0.1), tokenizer_folder)
    one, two = Shards(here), Shards(there)
    assert one.manifest["counts"] == two.manifest["counts"]
    assert one.manifest["counts"]["rows"] == 271
    assert [one.row(i).input_ids.tolist() for i in range(len(one))] == [
        two.row(i).input_ids.tolist() for i in range(len(two))
    ]
    (record,) = [json.loads(line) for line in (Path(there) / "quarantine.jsonl").read_text().splitlines()]
    assert record["file"] == "memory:///remote-sources/a.jsonl" and record["line"] == 91


class Served(MemoryFileSystem):
    """Files in memory under another scheme."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace(f"{cls.protocol}://", "memory://")))


class Chunked(Served):
    """A server that sends files in pieces, and does not say how long they are."""

    protocol = "chunked"

    def size(self, path: str) -> int | None:
        return None


class Hub(Served):
    """A server that knows its files by the ids of their blobs."""

    protocol = "blobs"
    blob_id = "1"

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        found = super().info(path, **kwargs)
        return {"name": found["name"], "size": found["size"], "type": found["type"], "blob_id": Hub.blob_id}


def test_a_file_of_unknown_length_is_not_an_empty_one(remote: Any) -> None:
    fsspec.register_implementation("chunked", Chunked, clobber=True)
    remote.pipe_file("/remote-sources/a.jsonl", b'{"text": "a"}')
    with pytest.raises(DataError, match=r"a\.jsonl: its server does not say how long it is; copy it"):
        find_sources(["chunked:///remote-sources/a.jsonl"])


def test_an_edit_of_equal_size_is_seen(
    remote: Any, config: Callable[..., DataConfig], tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("blobs", Hub, clobber=True)
    remote.pipe_file("/remote-sources/a.jsonl", b'{"text": "a"}')
    data = config("blobs:///remote-sources/a.jsonl")
    before = Preparation(data, tokenizer_folder).folder
    assert Preparation(data, tokenizer_folder).folder == before
    monkeypatch.setattr(Hub, "blob_id", "2")
    assert Preparation(data, tokenizer_folder).folder != before
