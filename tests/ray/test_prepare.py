"""Preparation through Ray Data: the same shards as in one process, and the same errors."""

import dataclasses
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.core.fs import digest_tree
from ftray.data import prepare as prepare_module
from ftray.data.prepare import prepare_local
from ftray.data.ray_prepare import prepare

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def write_corpus(folder: Path) -> None:
    for number in range(2):
        rows = [{"text": f"file {number} row {i} " + "word " * (i % 40)} for i in range(300)]
        rows += [{"prompt": "2 + 2 =", "completion": " 4"}, {"text": "the same in both"}]
        lines = [json.dumps(row) for row in rows]
        lines.insert(7, "{broken")
        lines.insert(200, "")
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines), "utf-8")


def tree(folder: Path) -> dict[str, str]:
    """Digests of the data set and of the cache's shards; times of files differ."""
    stamped = frozenset({"stamps.json", "used.json"})
    files = digest_tree(folder, skip=stamped) | digest_tree(folder.parent / "shards")
    return {name: digest for name, digest in files.items() if "/" not in name or name.endswith(".arrow")}


def test_the_shards_are_those_of_one_process(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 9_000)
    monkeypatch.setattr(prepare_module, "BLOCK_CHARS", 6_000)
    write_corpus(tmp_path)
    (tmp_path / "part-1.jsonl.gz").write_bytes(gzip.compress((tmp_path / "part-1.jsonl").read_bytes()))
    (tmp_path / "part-1.jsonl").unlink()
    data = DataConfig(
        train=[str(tmp_path / "*.jsonl*")],
        transforms=["clean", "length", "dedup"],  # type: ignore[list-item]
        max_length=128,
        cache_dir=str(tmp_path / "here"),
    )
    here = prepare_local(data, str(tiny_base))
    done: list[int] = []
    there = prepare(
        dataclasses.replace(data, cache_dir=str(tmp_path / "ray")),
        str(tiny_base),
        progress=lambda count, total: done.append(count),
    )
    files = tree(here)
    assert sum(name.endswith(".arrow") for name in files) >= 6
    assert tree(there) == files
    assert done == sorted(done) and len(done) > 12
    counts = json.loads((there / "manifest.json").read_text())["counts"]
    assert sum(counts["quarantined"].values()) == 2
    assert counts["filtered"] == {"dedup.duplicate": 2}
    lines = [json.loads(line)["line"] for line in (there / "quarantine.jsonl").read_text().splitlines()]
    assert lines == [8, 8]


def test_a_mistake_of_the_user_comes_back_as_one_line(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    plain = tmp_path / "tokenizer"
    plain.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (plain / name).write_bytes((tiny_base / name).read_bytes())
    data = DataConfig(train=[str(tmp_path / "rows.jsonl")], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="has no chat template") as caught:
        prepare(data, str(plain))
    assert "\n" not in str(caught.value)


def test_files_of_every_format_give_the_same_shards(tmp_path: Path, tiny_base: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = [{"question": f"what is {i}?", "answer": "word " * (i % 7 + 1)} for i in range(120)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (corpus / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-20])
    (corpus / "b.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), corpus / "c.parquet", row_group_size=50)
    (corpus / "d.csv").write_text(
        "question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows)
    )
    data = DataConfig(
        train=[f"{corpus}#400"],
        columns={"prompt": "question", "completion": "answer"},
        max_length=128,
        cache_dir=str(tmp_path / "here"),
    )
    here = prepare_local(data, str(tiny_base))
    there = prepare(dataclasses.replace(data, cache_dir=str(tmp_path / "ray")), str(tiny_base))
    assert tree(there) == tree(here)
    assert json.loads((there / "manifest.json").read_text())["counts"]["rows"] == 400
