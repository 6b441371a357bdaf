"""Source reading: every line belongs to exactly one work unit, wherever the cuts fall."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftray.core.errors import DataError
from ftray.data.source import find_files, read_lines, split_units


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
