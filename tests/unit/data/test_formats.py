"""Formats: every row of every kind of file is read or quarantined with its place and reason."""

import csv
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftray.core.errors import DataError
from ftray.data.rows import BadRow
from ftray.data.source import Records, SampleBy, find_sources, parse_record, split_units

ROWS = [{"text": f"row {i} é"} for i in range(200)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
Read = tuple[list[str], list[tuple[int, str]]]


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data).to_pybytes())


def parquet(rows: list[dict[str, Any]], path: Path, **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def arrow_stream(rows: list[dict[str, Any]], path: Path, batch_rows: int = 50) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


def arrow_file(rows: list[dict[str, Any]], path: Path) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return path


def read(path: Path | str, unit_bytes: int = 1 << 22, sample_by: SampleBy = "document") -> Read:
    """The texts of the usable rows, and (offset, reason) of the others."""
    texts: list[str] = []
    bad: list[tuple[int, str]] = []
    for unit in split_units(find_sources([str(path)], sample_by), unit_bytes):
        for record in Records(unit):
            try:
                texts += [span.text for span in parse_record(unit, record).spans]
            except BadRow as error:
                bad.append((record.offset, str(error)))
    return texts, bad


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def csv_of(rows: list[dict[str, str]], path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda p: write(p / "f.jsonl", LINES),
    "no suffix": lambda p: write(p / "rows", LINES),
    "jsonl.gz": lambda p: write(p / "f.jsonl.gz", gzip.compress(LINES)),
    "jsonl.gz of two members": lambda p: write(
        p / "f.jsonl.gz", gzip.compress(LINES[:70]) + gzip.compress(LINES[70:])
    ),
    "jsonl.zst": lambda p: write(p / "f.jsonl.zst", zstd(LINES)),
    "json array": lambda p: write(p / "f.json", json.dumps(ROWS, indent=2).encode()),
    "json lines named json": lambda p: write(p / "f.json", LINES),
    "json objects": lambda p: write(p / "f.json", b"\n".join(json.dumps(r, indent=1).encode() for r in ROWS)),
    "json.gz": lambda p: write(p / "f.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "parquet": lambda p: parquet(ROWS, p / "f.parquet", row_group_size=30),
    "arrow stream": lambda p: arrow_stream(ROWS, p / "f.arrow"),
    "arrow file": lambda p: arrow_file(ROWS, p / "f.arrow"),
    "csv": lambda p: csv_of([{"id": "1", **row} for row in ROWS], p / "f.csv"),
    "csv.zst": lambda p: write(p / "f.csv.zst", zstd(csv_of(ROWS, p / "f.csv").read_bytes())),
    "tsv": lambda p: csv_of(ROWS, p / "f.tsv", "\t"),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("unit_bytes", [700, 1 << 22])
def test_every_format_gives_every_row_in_order(tmp_path: Path, kind: str, unit_bytes: int) -> None:
    path = MAKERS[kind](tmp_path)
    texts, bad = read(path, unit_bytes)
    assert bad == []
    assert texts == [row["text"] for row in ROWS]
    units = split_units(find_sources([str(path)]), unit_bytes)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert units[0].start == 0 and units[-1].stop == path.stat().st_size
    assert all(one.stop == two.start for one, two in itertools.pairwise(units))
    if unit_bytes == 700 and kind in ("jsonl", "parquet", "arrow stream"):
        assert len(units) > 2


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
@pytest.mark.parametrize("damage", ["cut", "garbage", "flipped"])
def test_a_damaged_compressed_file_loses_its_rest_only(
    tmp_path: Path, compress: Callable[[bytes], bytes], damage: str
) -> None:
    import random

    noise = random.Random(0)
    rows = [{"text": f"{i} {noise.random()}"} for i in range(20_000)]
    content = compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "garbage":
        content += b"no such thing"
    else:
        middle = len(content) // 2
        content = (
            content[:middle]
            + bytes(byte ^ 0x55 for byte in content[middle : middle + 64])
            + content[middle + 64 :]
        )
    suffix = "gz" if compress is gzip.compress else "zst"
    texts, bad = read(write(tmp_path / f"f.jsonl.{suffix}", content))
    offset, reason = bad[-1]
    assert f"{len(texts) + len(bad) - 1:,} lines, {offset:,} bytes" in reason
    assert "damaged" in reason or "truncated" in reason
    if damage != "flipped":
        assert len(bad) == 1 and texts == [row["text"] for row in rows[: len(texts)]]
    assert len(texts) == 20_000 if damage == "garbage" else 3_000 < len(texts) < 15_000


@pytest.mark.parametrize(
    "name", ["f.jsonl.gz", "f.jsonl.zst", "f.parquet", "f.arrow", "f.txt.gz", "f.json.gz", "f.csv.gz"]
)
def test_a_file_that_is_something_else_is_one_bad_record(tmp_path: Path, name: str) -> None:
    texts, bad = read(write(tmp_path / name, LINES))
    assert texts == [] and len(bad) == 1 and bad[0][0] == 0
    assert "truncated" in bad[0][1] or "damaged" in bad[0][1]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_a_truncated_columnar_file(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    texts, bad = read(path)
    assert len(bad) == 1 and f"the rest is lost after {len(texts)} rows" in bad[0][1]
    assert len(texts) == (100 if kind == "arrow stream" else 0)


def test_a_damaged_row_group_leaves_the_others(tmp_path: Path) -> None:
    path = parquet(
        [{"text": f"{i}" * 50} for i in range(300)],
        tmp_path / "f.parquet",
        row_group_size=100,
        compression="zstd",
    )
    content = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    texts, bad = read(path, unit_bytes=1)
    assert len(texts) == 200
    assert [offset for offset, _ in bad] == [100]


def test_parquet_of_one_bad_string(tmp_path: Path) -> None:
    good = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary())
    strings = pa.StringArray.from_buffers(3, *good.buffers()[1:])
    pq.write_table(pa.table({"text": strings}), tmp_path / "f.parquet")
    assert read(tmp_path / "f.parquet") == (["a", "c"], [(1, "not UTF-8")])


def test_columnar_files_of_no_rows_no_known_column_and_nulls(tmp_path: Path) -> None:
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "zero.parquet")
    assert read(tmp_path / "zero.parquet") == ([], [])
    arrow_stream(ROWS[:0] or [{"text": "x"}], tmp_path / "one.arrow")
    texts, bad = read(parquet([{"other": 1}, {"other": 2}], tmp_path / "other.parquet"))
    assert texts == [] and [offset for offset, _ in bad] == [0, 1]
    mixed = [{"text": "a"}, {"prompt": "q", "completion": "b"}, {"text": None}, {"text": 3.5 and "c"}]
    texts, bad = read(
        parquet(
            [{**dict.fromkeys(("text", "prompt", "completion")), **row} for row in mixed],
            tmp_path / "m.parquet",
        )
    )
    assert texts == ["a", "q", "b", "c"] and len(bad) == 1 and "no `messages`" in bad[0][1]


def test_parquet_of_messages_with_nulls(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": "a", "tool_calls": None},
    ]
    assert read(parquet([{"messages": messages, "id": 1}], tmp_path / "f.parquet")) == (["q", "a"], [])


def test_schema_drift_and_wrong_types(tmp_path: Path) -> None:
    rows = [
        b'{"text": "a"}',
        b'{"text": 1}',
        b'{"text": ["a"]}',
        b'{"body": "a"}',
        b"3",
        b"null",
        b'{"text": "b", "more": {}}',
    ]
    texts, bad = read(write(tmp_path / "f.jsonl", b"\n".join(rows)))
    assert texts == ["a", "b"]
    assert [reason for _, reason in bad] == [
        "`text` is not a string",
        "`text` is not a string",
        "no `messages`, `prompt` + `completion` or `text`",
        "not a JSON object",
        "not a JSON object",
    ]
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "f.parquet")
    assert [reason for _, reason in read(tmp_path / "f.parquet")[1]] == ["`text` is not a string"] * 2


def test_csv_with_blank_lines_before_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n\ntext\nhello\n\nworld\n")
    [unit] = split_units(find_sources([str(tmp_path / "a.csv")]))
    assert [record.value for record in Records(unit)] == [{"text": "hello"}, {"text": "world"}]


def test_nested_fields_that_only_other_rows_have(tmp_path: Path) -> None:
    """A table's struct has the fields of all rows; a call is learnt with those of its own row."""
    calls = [{"calls": [{"city": "Paris"}]}, {"calls": [{"to": "Rome", "n": 2}, {"city": "Bonn"}]}]
    pq.write_table(pa.Table.from_pylist(calls), tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink:
        table = pa.Table.from_pylist(calls)
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        [unit] = split_units(find_sources([str(tmp_path / name)]))
        assert [record.value for record in Records(unit, {"prompt": "calls"})] == calls


def test_csv_that_is_not_as_it_should_be(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbfprompt,completion\r\n"two\nlines","b ""c"""\r\n'
        b"a,b,extra\r\n\r\nshort\r\n\xff,b\r\nnul\x00,b\r\n"
        b'"q"x,b\r\n5" pipe,b\r\nlast,"never closed\r\nc,d\r\n'
    )
    texts, bad = read(write(tmp_path / "f.csv", content))
    assert texts == ["two\nlines", 'b "c"', "nul\0", "b", '5" pipe', "b"]
    assert [reason for _, reason in bad] == [
        "more cells than the header has columns",
        "fewer cells than the header has columns",
        "not UTF-8",
        "not CSV: ',' expected after '\"'",
        "a quote is not closed, the rest is lost",
    ]
    for (offset, _), start in zip(bad, (b"a,b,extra", b"short", b"\xff", b'"q"x', b"last"), strict=True):
        assert content[offset:].startswith(start)
    assert read(write(tmp_path / "twice.csv", b"text,text\na,b\n")) == (
        [],
        [(0, "a column's name stands twice in the header")],
    )
    assert read(write(tmp_path / "head.csv", b"text\n")) == ([], [])
    long = "x" * 300_000
    assert read(write(tmp_path / "long.csv", f"text\n{long}\n".encode()))[0] == [long]


def test_json_files_that_are_not_as_they_should_be(tmp_path: Path) -> None:
    def bad_of(content: bytes) -> tuple[int, list[tuple[int, str]]]:
        texts, bad = read(write(tmp_path / "f.json", content))
        return len(texts), bad

    rows = [
        b'{"text": "\xc3\xa9"}',
        b'{"text": "\xff"}',
        b'{"text": NaN}',
        b'{"text": "a", "text": "b"}',
        b"3",
        b'{"text": "c"}',
    ]
    content = b"\xef\xbb\xbf[" + b", ".join(rows) + b"]"
    count, bad = bad_of(content)
    assert count == 2
    assert [reason for _, reason in bad] == [
        "not UTF-8",
        "not JSON: NaN",
        "a key stands twice in an object",
        "not a JSON object",
    ]
    assert [content[offset : offset + 10] for offset, _ in bad[:2]] == [b'{"text": "', b'{"text": N']
    for broken, rows in (
        (b'[{"text": "a"}, {"text": ', 1),
        (b'[{"text": "a"} {"text": "b"}]', 0),
        (b'[{"text": "a"},]', 0),
        (b'[{"text": "a"}', 1),
        (b'[{"text": "a"}] x', 1),
        (b"[" * 100_000, 0),
    ):
        count, bad = bad_of(broken)
        assert count == rows and len(bad) == 1 and f"the rest is lost after {rows} rows" in bad[0][1], broken
    assert bad_of(b"[]") == (0, [])
    assert bad_of(b" ") == (0, [])


TEXT = "\ufeffTitle\r\n\r\nFirst line,\nsecond line.\n\n\n  Indented\u2028one.\n"


@pytest.mark.parametrize(
    ("sample_by", "rows"),
    [
        ("document", [TEXT.removeprefix("\ufeff")]),
        ("paragraph", ["Title", "First line,\nsecond line.", "  Indented\u2028one."]),
        ("line", ["Title", "First line,", "second line.", "  Indented\u2028one."]),
    ],
)
@pytest.mark.parametrize("name", ["f.txt", "f.md", "f.txt.gz"])
def test_plain_text(tmp_path: Path, sample_by: SampleBy, rows: list[str], name: str) -> None:
    content = TEXT.encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert read(path, 1 << 22, sample_by) == (rows, [])
    assert read(path, 5, sample_by) == (rows, [])
    damaged = content.replace(b"second", b"sec\xffnd")
    path.write_bytes(gzip.compress(damaged) if name.endswith("gz") else damaged)
    texts, bad = read(path, 5, sample_by)
    assert len(bad) == 1 and bad[0][1] == "not UTF-8" and len(texts) == len(rows) - 1


def test_text_of_nothing_and_text_of_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftray.data.formats import text

    assert read(write(tmp_path / "f.txt", b"\n \n")) == ([], [])
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"set `data\.sample_by` to"):
        read(write(tmp_path / "f.txt", b"a" * (2 << 20)))


def test_a_line_of_50_megabytes(tmp_path: Path) -> None:
    long = "é" * (25 << 20)
    path = write(
        tmp_path / "f.jsonl", json.dumps({"text": long}, ensure_ascii=False).encode() + b"\n" + LINES
    )
    texts, bad = read(path)
    assert bad == [] and texts[0] == long and len(texts) == 201


def _json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.floats() | st.text(max_size=5)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )


@given(
    lines=st.lists(
        st.binary(max_size=30)
        | _json_values().map(lambda value: json.dumps(value).encode())
        | st.sampled_from([b"", b'{"text": "ok"}', b'{"messages": [{"role": "assistant", "content": "a"}]}'])
    ),
    name=st.sampled_from(
        ["f.jsonl", "f.json", "f.csv", "f.txt", "f.parquet", "f.arrow", "f.jsonl.gz", "f.jsonl.zst"]
    ),
    unit_bytes=st.integers(1, 200),
)
def test_no_content_stops_the_reading(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], name: str, unit_bytes: int
) -> None:
    """Whatever bytes a file holds, reading it ends with rows and reasons, never with an error."""
    path = write(tmp_path_factory.mktemp("any") / name, b"\n".join(lines))
    _, bad = read(path, unit_bytes)
    if name == "f.jsonl":
        content = [
            line for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()
        ]
        found = sum(1 for unit in split_units(find_sources([str(path)]), unit_bytes) for _ in Records(unit))
        assert found == len(content)
    assert all(isinstance(reason, str) and "\n" not in reason for _, reason in bad)
