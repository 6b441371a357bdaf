"""Transforms and chat templates through a whole preparation: every row is accounted for in the manifest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.core.spec import parse
from ftray.data.prepare import prepare_local
from ftray.data.read import IGNORE_INDEX, Shards
from ftray.testing.tiny import byte_tokenizer

Make = Callable[..., DataConfig]
WriteRows = Callable[..., Path]

# An answer that is not the last one is shortened to its first letter.
REWRITING = (
    "{% for m in messages %}{{ m.role[0] + ':' }}"
    "{{ m.content if m.role != 'assistant' or loop.last else m.content[0] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


def counts_of(folder: Path) -> dict[str, Any]:
    counts: dict[str, Any] = Shards(folder).manifest["counts"]
    assert counts["rows"] == counts["documents"] + sum(counts["filtered"].values()) + sum(
        counts["quarantined"].values()
    )
    return counts


def documents(folder: Path) -> list[tuple[list[int], list[int]]]:
    found, shards = [], Shards(folder)
    for index in range(len(shards)):
        row = shards.row(index)
        cuts = np.cumsum(row.doc_lens)[:-1]
        for ids, labels in zip(np.split(row.input_ids, cuts), np.split(row.labels, cuts), strict=True):
            found.append((ids.tolist(), labels[labels != IGNORE_INDEX].tolist()))
    return found


def test_every_transform_at_once(write_rows: WriteRows, config: Make, tokenizer_folder: str) -> None:
    prose = "The ship left the harbour at noon and nobody on the quay waved to its crew, number {}."
    rows = [{"text": prose.format(i) + f" Write to sailor{i % 3}@sea.org.\r\n" + "x" * i} for i in range(6)]
    rows += [rows[0], {"text": "Das Schiff verließ den Hafen am Mittag, und niemand winkte der Mannschaft."}]
    rows += [{"text": "tiny"}, {"text": " \u0007"}]
    transforms: list[Any] = [
        "clean",
        {"type": "length", "min_chars": 10},
        {"type": "language", "keep": ["en"]},
        "pii",
        "dedup",
        {"type": "near_dedup", "threshold": 0.5, "ngram": 2},
    ]
    data = config(write_rows(rows), transforms=transforms, max_length=512)
    counts = counts_of(prepare_local(data, tokenizer_folder))
    assert counts["filtered"] == {
        "clean.empty": 1,
        "dedup.duplicate": 1,
        "language.de": 1,
        "length.short": 1,
        "near_dedup.near_duplicate": 5,
    }
    assert counts["changed"] == {"clean.control_characters": 1, "clean.line_ends": 7, "pii.email": 7}


def test_a_rewritten_conversation_is_one_row(write_rows: WriteRows, config: Make, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = REWRITING
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = write_rows([{"messages": TALK}, {"messages": TALK[:2]}])
    folder = prepare_local(config(source), str(tmp_path / "tokenizer"))
    assert counts_of(folder)["documents"] == 2
    shown = sorted((tokenizer.decode(ids), tokenizer.decode(learnt)) for ids, learnt in documents(folder))
    assert shown == [
        ("u:one<|end|>a:f<|end|>u:two<|end|>a:second<|end|>", "second<|end|>"),
        ("u:one<|end|>a:first<|end|>", "first<|end|>"),
        ("u:one<|end|>a:first<|end|>", "first<|end|>"),
    ]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("split", {"documents": 3, "split_documents": 2, "truncated_documents": 0, "filtered": {}}),
        (
            "reject",
            {"documents": 1, "split_documents": 0, "truncated_documents": 0, "filtered": {"overlong": 2}},
        ),
        (
            "truncate_left",
            {
                "documents": 2,
                "split_documents": 0,
                "truncated_documents": 1,
                "filtered": {"overlong_reply": 1},
            },
        ),
    ],
)
def test_overlong_policies(
    write_rows: WriteRows, config: Make, tokenizer_folder: str, policy: str, expected: dict[str, Any]
) -> None:
    rows = [
        {"prompt": "p" * 100, "completion": "the reply"},
        {"prompt": "p", "completion": "r" * 100},
        {"prompt": "p", "completion": "r"},
    ]
    folder = prepare_local(config(write_rows(rows), overlong=policy), tokenizer_folder)
    counts = counts_of(folder)
    assert {key: counts[key] for key in expected} == expected
    learnt = [len(targets) for _, targets in documents(folder)]
    replies = {"split": [10, 101, 2], "reject": [2], "truncate_left": [10, 2]}[policy]
    assert sum(learnt) == sum(replies) and max(len(ids) for ids, _ in documents(folder)) <= 64


def test_a_template_without_an_end_of_turn_stops_the_preparation(
    write_rows: WriteRows, config: Make, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="nothing says where to stop"):
        prepare_local(config(write_rows([{"messages": TALK}])), str(tmp_path / "tokenizer"))


def test_a_recipe_names_every_transform() -> None:
    transforms: list[Any] = ["quality", "pii", "split", {"type": "language", "keep": ["en"]}]
    data = parse(DataConfig, {"train": "x", "transforms": transforms})
    assert data.validation == ["x"]  # what `split` sets apart
    none: list[Any] = [{"type": "split", "validation": 0}]
    assert parse(DataConfig, {"train": "x", "transforms": none}).validation == []
