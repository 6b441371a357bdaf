"""Source reading: every line belongs to exactly one work unit, wherever the cuts fall."""

import gzip
import importlib.util
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.core.errors import DataError
from ftray.data.hub import hub_files
from ftray.data.source import Records, find_files, find_sources, parse_record, read_lines, split_units


@settings(deadline=None)
@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=20), st.integers(1, 30))
def test_units_read_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "f.jsonl"
    path.write_bytes(b"\n".join(lines))
    whole = path.read_bytes()
    found, total = [], 0
    for unit in split_units([path], unit_bytes=size):
        read, number = read_lines(unit)
        found += [(line.offset, total + line.number, line.content.rstrip(b"\n")) for line in read]
        total += number
    expected, offset = [], 0
    for number, line in enumerate(whole.split(b"\n")):
        if line.strip() and not (offset == 0 and line.startswith(b"\xef\xbb\xbf")):
            expected.append((offset, number, line))
        offset += len(line) + 1
    if not whole.startswith(b"\xef\xbb\xbf"):
        assert found == expected


def test_byte_order_mark_crlf_and_missing_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"b": 2}')
    lines, number = read_lines(split_units([path])[0])
    assert [(line.offset, line.number, line.content.strip()) for line in lines] == [
        (3, 0, b'{"a": 1}'),
        (15, 2, b'{"b": 2}'),
    ]
    assert number == 3


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("{}")
    names = [path.name for path in find_files([str(tmp_path / "*.jsonl"), str(tmp_path / "b.jsonl")])]
    assert names == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in find_files([str(tmp_path)])] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file; check"):
        find_files([str(tmp_path / "nothing.jsonl")])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as `datasets` saves it, two files of 30 rows."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(60)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder), num_shards=2)
    return folder


def rows_of(patterns: list[str]) -> list[str]:
    units = split_units(find_sources(patterns))
    return [parse_record(unit, record).spans[0].text for unit in units for record in Records(unit)]


def test_a_saved_data_set(saved: Path) -> None:
    assert rows_of([str(saved)]) == [f"q{i}" for i in range(60)]
    datasets = pytest.importorskip("datasets")
    both = saved.parent / "both"
    datasets.DatasetDict({"train": datasets.load_from_disk(str(saved))}).save_to_disk(str(both))
    with pytest.raises(DataError, match=r"holds the splits train; name one, as .*/both/train"):
        find_sources([str(both)])
    assert len(rows_of([str(both / "train")])) == 60


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (file,) = hub_files(str(tmp_path / "repo"))
    assert rows_of([file]) == ["a", "b"]
    with pytest.raises(
        DataError, match="owner/no-such-set: no such file, and `datasets` cannot load it"
    ) as caught:
        find_sources(["owner/no-such-set:test"])
    assert "\n" not in str(caught.value)


def test_hub_ids_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"owner/name: no such file; .* `pip install datasets`"):
        find_sources(["owner/name"])


def test_urls() -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("corpus/b.jsonl", "corpus/a.jsonl", "corpus/README.md", "corpus/.hidden/c.jsonl"):
        system.pipe_file(f"/{name}", json.dumps({"text": name}).encode())
    content = b"".join(json.dumps({"text": f"{i}"}).encode() + b"\n" for i in range(100))
    system.pipe_file("/corpus/sub/z.jsonl.gz", gzip.compress(content))
    system.pipe_file("/corpus/sub/w.jsonl", content)
    try:
        files = [source.file for source in find_sources(["memory://corpus"])]
        assert files == [
            f"memory:///corpus/{name}" for name in ("a.jsonl", "b.jsonl", "sub/w.jsonl", "sub/z.jsonl.gz")
        ]
        assert rows_of(["memory://corpus/*.jsonl"]) == ["corpus/a.jsonl", "corpus/b.jsonl"]
        assert rows_of(["memory://corpus/sub/z.jsonl.gz"]) == [f"{i}" for i in range(100)]
        source = find_sources(["memory://corpus/sub/w.jsonl"])
        pieces = [record.offset for unit in split_units(source, 100) for record in Records(unit)]
        assert len(pieces) == 100 and pieces == sorted(set(pieces))
        assert len(rows_of(["memory://corpus/sub/w.jsonl#7"])) == 7
        with pytest.raises(DataError, match="memory://corpus/none: no such file"):
            find_sources(["memory://corpus/none"])
        with pytest.raises(DataError, match="not a local file"):
            find_files(["memory://corpus/a.jsonl"])
    finally:
        system.rm("/corpus", recursive=True)
    with pytest.raises(DataError, match="no such kind of URL"):
        find_sources(["nowhere://a/b.jsonl"])
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(DataError, match=r"what opens `s3://` is not installed; pip install s3fs"):
            find_sources(["s3://bucket/a.jsonl"])


def test_folders(tmp_path: Path) -> None:
    for name in ("a.jsonl", "sub/b.csv", "README.md", ".git/c.jsonl", "_tmp/d.jsonl", "e.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    relative = [Path(s.file).relative_to(tmp_path).as_posix() for s in find_sources([str(tmp_path)])]
    assert relative == ["a.jsonl", "sub/b.csv"]
    prose = tmp_path / "prose"
    prose.mkdir()
    for name in ("b.md", "a.txt", "c.py"):
        (prose / name).write_text(f"text of {name}")
    assert rows_of([str(prose)]) == ["text of a.txt", "text of b.md"]
    with pytest.raises(DataError, match=r"e\.bin: a kind of file that is not read; known: \.jsonl"):
        find_sources([str(tmp_path / "e.bin")])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no such file; check the path"):
        find_sources([str(tmp_path / "none")])


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_sample_is_the_same_rows_every_time(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        rows = [{"text": f"{name}{i}"} for i in range(300)]
        if suffix == "jsonl":
            (tmp_path / f"{name}.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", row_group_size=40)
    every = rows_of([f"{tmp_path}/*.{suffix}"])
    found = rows_of([f"{tmp_path}/*.{suffix}#50"])
    assert len(found) == len(set(found)) == 50
    assert found == sorted(found, key=every.index) and found != every[:50]
    assert {text[0] for text in found} == {"a", "b"}
    assert rows_of([f"{tmp_path}/*.{suffix}#50"]) == found
    assert rows_of([f"{tmp_path}/*.{suffix}#5000"]) == every
    two = rows_of([f"{tmp_path}/a.{suffix}#3", f"{tmp_path}/b.{suffix}"])
    assert len(two) == 303
    units = split_units(find_sources([f"{tmp_path}/*.{suffix}#5"]), 500)
    assert [unit.index for unit in units] == list(range(len(units)))
    (tmp_path / "odd#5").write_text('{"text": "x"}\n')
    assert rows_of([str(tmp_path / "odd#5")]) == ["x"]


def test_paragraphs_are_not_read_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(("many words of a paragraph " * 40 + "\n\n") * 10_000)
    [unit] = split_units(find_sources([str(path)], "paragraph"))
    tracemalloc.start()
    count = sum(1 for record in Records(unit) if record.value is not None)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000 and peak_bytes < path.stat().st_size / 2
