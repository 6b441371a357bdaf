"""Sources at URLs are prepared as local ones are."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftray.config.recipe import DataConfig
from ftray.data.prepare import prepare_local
from ftray.data.read import Shards

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
