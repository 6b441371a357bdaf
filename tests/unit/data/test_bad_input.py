"""Whole corpora with everything wrong in them: rows in = used + filtered + quarantined, each with its place."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.data.prepare import prepare_local
from ftray.data.read import Shards
from ftray.data.tokenise import tokeniser
from ftray.testing.tiny import byte_tokenizer

Make = Callable[..., DataConfig]
USER = {"role": "user", "content": "q"}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text("utf-8").splitlines()]


NO_TARGET = "nothing to learn: no assistant message with a weight"
BAD_LINES: dict[bytes, str] = {
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\ud800"}': "a lone surrogate, which no UTF-8 text can hold",
    b'{"text": 1}': "`text` is not a string",
    b'{"txt": "a"}': "no `messages`, `prompt` + `completion` or `text`",
    b'{"text": NaN}': "not JSON: NaN",
    b'{"text": "a", "text": "b"}': "a key stands twice in an object",
    b'{"text": "\x00"}': "not JSON: Invalid control character at",
    b'{"messages": [{"content": "a"}]}': "a message's `role` is none of system, developer, user, assistant, tool",
    b'{"messages": [{"role": "user", "content": "a"}]}': NO_TARGET,
    b'{"messages": [{"role": "assistant", "content": ""}]}': "the text to learn is empty",
    b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}': NO_TARGET,
}


def write_all(folder: Path) -> dict[str, int]:
    """One file for each kind of trouble; returns the rows of each."""
    good = b'{"text": "good"}'
    lines = [b"\xef\xbb\xbf" + good, *BAD_LINES, b'{"text": "\\u0000"}', b"", good]
    (folder / "a.jsonl").write_bytes(b"\r\n".join(lines))
    (folder / "b-empty.jsonl").write_bytes(b"")
    content = gzip.compress(b"".join(b'{"text": "row %d"}\n' % i for i in range(5000)))
    (folder / "c-truncated.jsonl.gz").write_bytes(content[: len(content) // 2])
    zero = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(zero, folder / "d-zero.parquet")
    pq.write_table(pa.table({"text": ["a", "b"]}), folder / "e-truncated.parquet")
    cut = (folder / "e-truncated.parquet").read_bytes()[:-9]
    (folder / "e-truncated.parquet").write_bytes(cut)
    (folder / "f.csv").write_bytes(b"text,more\ngood,1\nbad,2,3\n")
    (folder / "g.json").write_bytes(b'[{"text": "good"}, {"text": ')
    return {
        "a.jsonl": len(lines) - 1,
        "b-empty.jsonl": 0,
        "d-zero.parquet": 0,
        "e-truncated.parquet": 1,
        "f.csv": 2,
        "g.json": 2,
    }


def test_rows_in_are_used_filtered_or_quarantined(
    tmp_path: Path, config: Make, tokenizer_folder: str
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = write_all(corpus)
    folder = prepare_local(config(corpus, max_quarantine=1), tokenizer_folder)
    counts, bad = Shards(folder).manifest["counts"], records(folder)
    by_file = {
        name: [r for r in bad if Path(r["file"]).name == name] for name in {Path(r["file"]).name for r in bad}
    }
    (truncated,) = by_file["c-truncated.jsonl.gz"]
    assert "the gzip file is truncated: the rest is lost after" in truncated["reason"]
    used_of_gz = truncated["line"] - 1
    assert 1000 < used_of_gz < 4000
    assert counts["rows"] == sum(rows.values()) + used_of_gz + 1
    assert counts["documents"] == 2 + used_of_gz + 1 + 1
    assert counts["filtered"] == {"clean.empty": 1}
    assert counts["rows"] == counts["documents"] + 1 + sum(counts["quarantined"].values())
    content = (corpus / "a.jsonl").read_bytes()
    assert [record["reason"] for record in by_file["a.jsonl"]] == list(BAD_LINES.values())
    for record, line in zip(by_file["a.jsonl"], BAD_LINES, strict=True):
        assert content[record["offset"] :].startswith(line)
        assert content.split(b"\r\n")[record["line"] - 1] == line
    assert by_file["e-truncated.parquet"][0]["reason"].startswith("the Parquet file is truncated or damaged")
    assert by_file["f.csv"][0] == {
        "file": str(corpus / "f.csv"),
        "offset": 17,
        "line": 2,
        "reason": "more cells than the header has columns",
    }
    assert "the rest is lost after 1 rows" in by_file["g.json"][0]["reason"]


def test_too_many_bad_rows_stop_the_preparation(tmp_path: Path, config: Make, tokenizer_folder: str) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\n" + b"good\n" * 90 + b"a,b\n" * 6 + b"\xff\n" * 4)
    with pytest.raises(
        DataError, match=r"10 of 100 rows cannot be used.* more cells .* \(6x\); not UTF-8 \(4x\)"
    ):
        prepare_local(config(tmp_path / "a.csv", max_quarantine=0.05), tokenizer_folder)


TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m.get('tool_calls') %}{{ m['tool_calls'] | tojson }}{% endif %}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def hard_rows() -> list[tuple[dict[str, Any], str]]:
    """Rows that are right, however odd, and what must be among the learnt text of each."""
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        nested = {"type": "object", "properties": {"ключ": nested}}
    tool = {"type": "function", "function": {"name": "deep", "parameters": nested}}
    call = {
        "type": "function",
        "function": {"name": "deep", "arguments": {"ключ": [[["\u2028", {"": None}]]]}},
    }
    answers = [
        "👩‍👩‍👧‍👦",
        "‮right to left‬ שלום",
        "z̸̢͠a̶̛l̷̡g̵o",
        "line\u2028end\u2029and\x85next",
        "\U0010fffd\ue000",
        "a\tb\n\n  c  ",
        "<|end|> in text",
        "\\u0000 and \\n",
        '{"json": "in text"}',
    ]
    rows: list[tuple[dict[str, Any], str]] = [({"text": answer}, answer.strip()[:4]) for answer in answers]
    rows += [({"prompt": "", "completion": " after no prompt"}, "after no prompt")]
    rows += [
        ({"messages": [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": a}]}, a[:4])
        for a in answers
    ]
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": ""},
    ]
    rows += [({"messages": [*turns, {"role": "assistant", "content": "done"}], "tools": [tool]}, "done")]
    rows += [({"messages": [*turns[:2]], "tools": json.dumps([tool])}, '"name": "deep"')]
    rows += [
        (
            {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "to nothing"}]},
            "to nothing",
        )
    ]
    rows += [({"messages": [USER, {"role": "assistant", "content": "x"}] * 200}, "x")]
    rows += [({"text": "long " * 200_000, "meta": {"a": [1e308, -0.0, True, None]}}, "long ")]
    return rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_hard_rows_come_through_whole(tmp_path: Path, config: Make, kind: str) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer = byte_tokenizer(folder)
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(folder)
    rows = hard_rows()
    path = tmp_path / f"rows.{kind}"
    lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row, _ in rows)
    if kind == "parquet":
        # A table has one type for a column, so what is nested travels as its JSON.
        flat = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row, _ in rows]
        names = dict.fromkeys(name for row in flat for name in row)
        pq.write_table(pa.Table.from_pylist([{**names, **row} for row in flat]), path)
    elif kind == "json":
        path.write_text(json.dumps([row for row, _ in rows]))
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    data = config(
        path,
        packing=False,
        max_length=2_000_000,
        transforms=[{"type": "clean", "unicode_form": "none", "control_characters": "keep"}],
    )
    shards = Shards(prepare_local(data, str(folder)))
    counts = shards.manifest["counts"]
    assert counts["rows"] == counts["documents"] == len(rows)
    assert counts["quarantined"] == {} and counts["filtered"] == {}
    backend = tokeniser(str(folder)).backend
    learnt = [
        backend.decode(row.labels[row.labels >= 0].tolist(), skip_special_tokens=False)
        for row in map(shards.row, range(len(shards)))
    ]
    missing = [answer for _, answer in rows if not any(answer in text for text in learnt)]
    assert missing == []
    assert max(map(len, learnt)) >= 1_000_000
