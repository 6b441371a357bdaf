"""Whole files of JSON: one array of rows, rows one after another, or JSON lines under the wrong name."""

import json
import re
from collections.abc import Iterator

from ftray.data.formats.base import Damaged, Record, Unit, blocks
from ftray.data.formats.text import BOM, read_jsonl
from ftray.data.spans import BadRow

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_json(unit: Unit) -> Iterator[Record]:
    """A row for each value; after a mistake nothing says where the next begins, so the rest is one bad record."""
    content, damage = _read(unit)
    head = content.removeprefix(BOM).lstrip()
    if not head.startswith(b"[") and _is_json(head.partition(b"\n")[0]):
        yield from read_jsonl(unit)
        return
    # Bytes that are no UTF-8 pass here and are refused in the row that holds them.
    text = content.decode("utf-8", "surrogateescape")
    position = _after(text, 0, "\ufeff")
    is_array = text[position : position + 1] == "["
    position = _after(text, position + is_array)
    offset, number = len(_bytes(text[:position])), 0
    while position < len(text) and not (is_array and text[position] == "]"):
        try:
            _, end = _DECODER.raw_decode(text, position)
            row = _bytes(text[position:end])
            after = _after(text, end)
            if is_array:
                after = _next_in_array(text, after)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "a nesting beyond any limit"
            yield _lost(offset, number, damage or f"not JSON: {reason}")
            return
        yield Record(offset, number, row)
        offset, number, position = offset + len(row) + len(_bytes(text[end:after])), number + 1, after
    if damage or (is_array and position >= len(text)):
        yield _lost(offset, number, damage or "not JSON: the array does not end")
    elif is_array and text[position + 1 :].strip():
        yield _lost(offset, number, "not JSON: something stands behind the array")


def _lost(offset: int, number: int, why: str) -> Record:
    return Record(offset, number, BadRow(f"{why}: the rest is lost after {number:,} rows, {offset:,} bytes"))


def _read(unit: Unit) -> tuple[bytes, str]:
    """The file's bytes, and what is wrong with it."""
    pieces: list[bytes] = []
    try:
        pieces.extend(blocks(unit))
    except Damaged as error:
        return b"".join(pieces), str(error)
    return b"".join(pieces), ""


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _after(text: str, position: int, skipped: str = "") -> int:
    if skipped and text.startswith(skipped, position):
        position += len(skipped)
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _next_in_array(text: str, position: int) -> int:
    """Where the next element, or the array's end, is."""
    if text[position : position + 1] == ",":
        after = _after(text, position + 1)
        if text[after : after + 1] != "]":
            return after
    elif text[position : position + 1] in ("]", ""):
        return position
    raise json.JSONDecodeError("Expecting ',' or ']' between rows", text, position)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
