"""Preparation in one process: shards, counts, quarantine, and the errors of a corpus that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.data import prepare as prepare_module
from ftray.data.batch import collate
from ftray.data.prepare import prepare_local
from ftray.data.read import IGNORE_INDEX, Shards
from ftray.testing.tiny import byte_tokenizer

Make = Callable[..., DataConfig]
WriteRows = Callable[..., Path]


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"row {i} " + "word " * (i % 9)} for i in range(count)]


def documents_of(shards: Shards) -> list[list[int]]:
    found = []
    for index in range(len(shards)):
        row = shards.row(index)
        found += [part.tolist() for part in np.split(row.input_ids, np.cumsum(row.doc_lens)[:-1])]
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text("utf-8").splitlines()]


def test_every_document_is_in_the_shards(write_rows: WriteRows, config: Make, tokenizer_folder: str) -> None:
    rows = texts(50)
    calls: list[tuple[int, int | None]] = []
    source = write_rows(rows)
    folder = prepare_local(config(source), tokenizer_folder, progress=lambda *call: calls.append(call))
    shards = Shards(folder)
    tokenizer = byte_tokenizer(folder.parent / "again")
    expected = sorted([*tokenizer.encode(row["text"]), 0] for row in rows)
    assert sorted(documents_of(shards)) == expected
    counts = shards.manifest["counts"]
    assert counts["rows"] == counts["documents"] == 50
    assert counts["tokens"] == sum(map(len, expected))
    assert counts["targets"] == counts["tokens"] - 50
    assert counts["packed_rows"] == len(shards) < 50
    size = source.stat().st_size
    assert calls[0] == (0, size) and calls[-1] == (size, size)
    assert records(folder) == []


def test_a_batch_of_shard_rows(write_rows: WriteRows, config: Make, tokenizer_folder: str) -> None:
    shards = Shards(prepare_local(config(write_rows(texts(20))), tokenizer_folder))
    rows = [shards.row(0), shards.row(-1), shards.row(1)]
    batch = collate(rows, [0, -1, 1])
    tokens = sum(len(row.input_ids) for row in rows)
    assert batch.input_ids.shape == batch.labels.shape == batch.weights.shape == (1, tokens)
    assert batch.num_tokens == tokens
    assert batch.num_targets == sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows)
    bounds = batch.cu_seq_lens.tolist()
    assert bounds[0] == 0 and bounds[-1] == tokens
    lens = np.concatenate([row.doc_lens for row in rows])
    assert np.array_equal(np.diff(bounds), lens)
    assert batch.position_ids[0].tolist() == [i for length in lens for i in range(length)]
    assert batch.row_ids.tolist() == [0, -1, 1]
    for tensor, name in (
        (batch.input_ids, "input_ids"),
        (batch.labels, "labels"),
        (batch.weights, "weights"),
    ):
        assert np.array_equal(tensor[0], np.concatenate([getattr(row, name) for row in rows])), name
    wide = (batch.input_ids, batch.labels, batch.position_ids, batch.row_ids)
    assert {tensor.dtype for tensor in wide} == {torch.int64}
    assert batch.weights.dtype == torch.float32
    assert batch.cu_seq_lens.dtype == batch.group_lens.dtype == torch.int32
    assert batch.to("cpu").input_ids.equal(batch.input_ids)
    with pytest.raises(IndexError):
        shards.row(len(shards))


def test_bad_rows_are_quarantined_with_their_place(
    write_rows: WriteRows, config: Make, tokenizer_folder: str
) -> None:
    content = (
        b'\xef\xbb\xbf{"text": "first"}\r\n'
        b"{broken\r\n"
        b"\r\n"
        b'{"text": "caf\xe9"}\n'
        b'{"other": 1}\n'
        b'{"text": " "}\n'
        b'{"text": "last"}'
    )
    source = write_rows(content)
    folder = prepare_local(config(source, max_quarantine=0.6), tokenizer_folder)
    found = records(folder)
    assert [(r["line"], r["reason"]) for r in found] == [
        (2, "not JSON: Expecting property name enclosed in double quotes"),
        (4, "not UTF-8"),
        (5, "no `messages`, `prompt` + `completion` or `text`"),
    ]
    for record in found:
        assert record["file"] == str(source)
        assert content[record["offset"] :].startswith(content.splitlines()[record["line"] - 1])
    counts = Shards(folder).manifest["counts"]
    assert (counts["rows"], counts["documents"], counts["filtered"]) == (6, 2, {"clean.empty": 1})


@given(kinds=st.lists(st.sampled_from(["good", "bad", "blank", "empty", "long"]), min_size=1, max_size=25))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_in_are_rows_accounted_for(
    kinds: list[str], tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 60)
    lines = {"good": '{"text": "good"}', "bad": "{", "blank": "", "empty": '{"text": "\\u0000"}'}
    lines["long"] = json.dumps({"text": "x" * 200})
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(lines[kind] for kind in kinds))
    data = DataConfig(
        train=[str(source)],
        cache_dir=str(tmp_path / "cache"),
        max_length=64,
        max_quarantine=1,
        overlong="reject",
    )
    try:
        counts = Shards(prepare_local(data, tokenizer_folder)).manifest["counts"]
    except DataError:
        assert "good" not in kinds
        return
    assert counts["rows"] == sum(kind != "blank" for kind in kinds)
    assert counts["documents"] == kinds.count("good")
    assert counts["filtered"].get("clean.empty", 0) == kinds.count("empty")
    assert counts["filtered"].get("overlong", 0) == kinds.count("long")
    assert sum(counts["quarantined"].values()) == kinds.count("bad")


def test_unchanged_input_costs_nothing_and_changed_input_is_seen(
    write_rows: WriteRows, config: Make, tokenizer_folder: str
) -> None:
    source = write_rows(texts(10))
    first = prepare_local(config(source), tokenizer_folder)
    stamp = (first / "manifest.json").stat().st_mtime_ns
    assert prepare_local(config(source), tokenizer_folder) == first
    assert (first / "manifest.json").stat().st_mtime_ns == stamp
    assert prepare_local(config(source, max_length=32), tokenizer_folder) != first
    assert prepare_local(config(source, transforms=["clean", "dedup"]), tokenizer_folder) != first
    write_rows(texts(11))
    assert prepare_local(config(source), tokenizer_folder) != first


def test_equal_data_elsewhere_have_the_same_identity(
    write_rows: WriteRows, config: Make, tokenizer_folder: str
) -> None:
    one = Shards(prepare_local(config(write_rows(texts(10), "a.jsonl")), tokenizer_folder))
    two = Shards(prepare_local(config(write_rows(texts(10), "b.jsonl")), tokenizer_folder))
    three = Shards(prepare_local(config(write_rows(texts(9), "c.jsonl")), tokenizer_folder))
    assert one.path != two.path
    assert one.digest == two.digest != three.digest


def test_overlong_documents_are_split_with_every_target(
    write_rows: WriteRows, config: Make, tokenizer_folder: str
) -> None:
    source = write_rows([{"text": "abcdefghij" * 20}, {"text": "short"}])
    shards = Shards(prepare_local(config(source), tokenizer_folder))
    assert shards.manifest["counts"]["split_documents"] == 1
    assert shards.manifest["counts"]["targets"] == 200 + 5
    assert max(map(len, documents_of(shards))) == 64


def test_dedup_is_over_all_files(write_rows: WriteRows, config: Make, tokenizer_folder: str) -> None:
    write_rows([{"text": "same"}, {"text": "one"}], "a.jsonl")
    path = write_rows([{"text": "Same "}, {"text": "two"}], "b.jsonl")
    data = config(str(path.parent / "*.jsonl"), transforms=["clean", "dedup"])
    counts = Shards(prepare_local(data, tokenizer_folder)).manifest["counts"]
    assert counts["documents"] == 3 and counts["filtered"] == {"dedup.duplicate": 1}


def test_validation_is_prepared_apart(write_rows: WriteRows, config: Make, tokenizer_folder: str) -> None:
    path = write_rows(texts(4), "v.jsonl")
    data = config(write_rows(texts(9)), validation=str(path))
    shards = Shards(prepare_local(data, tokenizer_folder, "validation"))
    assert shards.manifest["counts"]["rows"] == 4
    with pytest.raises(DataError, match=r"data\.validation: names no file"):
        prepare_local(config(path), tokenizer_folder, "validation")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there are no rows"),
        (b"\n \n", "there are no rows"),
        (b'{"text": " "}\n', r"no row is left after the transforms \(filtered: clean.empty 1\)"),
        (b"{\n" * 3 + b'{"text": 1}\n' * 2 + b"[1]\n", r"6 of 6 rows cannot be used"),
    ],
)
def test_corpora_that_cannot_be_used(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepare_local(config(write_rows(content)), tokenizer_folder)
    assert "\n" not in str(caught.value)


def test_the_three_commonest_reasons_are_named(
    write_rows: WriteRows, config: Make, tokenizer_folder: str
) -> None:
    content = b"{]\n" * 4 + b'{"text": 1}\n' * 3 + b"[1]\n" * 2 + b'{"a": 1}\n' + b'{"text": "ok"}\n' * 90
    data = config(write_rows(content), max_quarantine=0.05)
    with pytest.raises(DataError) as caught:
        prepare_local(data, tokenizer_folder)
    message = str(caught.value)
    assert "10 of 100 rows cannot be used, more than max_quarantine 0.05 allows" in message
    assert "(4x); `text` is not a string (3x); not a JSON object (2x); see " in message
    assert "no `messages`" not in message
    assert len(Path(message.rsplit("see ", 1)[1]).read_text().splitlines()) == 10
    # Raising the limit needs no second preparation.
    again = prepare_local(config(write_rows(content), max_quarantine=0.1), tokenizer_folder)
    assert len(Shards(again)) > 0


def test_a_missing_file(config: Make, tokenizer_folder: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        prepare_local(config(tmp_path / "absent.jsonl"), tokenizer_folder)


def test_a_damaged_shard_is_named(write_rows: WriteRows, config: Make, tokenizer_folder: str) -> None:
    folder = prepare_local(config(write_rows(texts(10))), tokenizer_folder)
    shard = next(folder.parent.glob("shards/*/*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match=shard.name):
        Shards(folder)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}: missing"):
        Shards(folder)
    with pytest.raises(DataError, match="is not prepared data"):
        Shards(folder.parent)
