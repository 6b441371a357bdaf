"""Preference rows from their fields to batches: what TRL makes of them, kept in pairs all the way."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from trl.data_utils import maybe_extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.data.batch import collate
from ftray.data.inspect import documents
from ftray.data.order import Order
from ftray.data.overlong import fit
from ftray.data.pairs import check_kind
from ftray.data.prepare import prepare_local
from ftray.data.read import IGNORE_INDEX, Shards, padding_row
from ftray.data.rows import BadRow, parse_row, to_table
from ftray.data.tokenise import Tokeniser, tokenise
from ftray.testing.tiny import byte_tokenizer

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "is 7 odd?"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no, it is even"}
AGAIN = {"role": "user", "content": "and 8?"}

PAIRS = [
    {"prompt": "2+2=", "chosen": " 4", "rejected": " five"},
    {"prompt": "ends<|end|> with", "chosen": " its token<|end|>", "rejected": "x"},
    {"prompt": "héllo ", "chosen": "wörld", "rejected": "wörld wide"},
    {"chosen": "Q: is 7 odd? A: yes", "rejected": "Q: is 7 odd? A: no"},
    {"chosen": "the one is longer", "rejected": "the one is longer by far"},
    {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    {"prompt": [SYSTEM, USER, YES, AGAIN], "chosen": [NO], "rejected": [YES]},
    {"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
    {"chosen": [USER, YES, AGAIN, NO], "rejected": [USER, YES, AGAIN, YES]},
    {"prompt": [USER], "chosen": [YES], "rejected": [YES]},
]

Config = Callable[..., DataConfig]
WriteRows = Callable[..., Path]


def of_trl(row: dict[str, Any], tok: Tokeniser) -> list[tuple[list[int], list[int]]]:
    """(ids, completion mask) of the chosen and of the rejected sequence, from TRL's trainer and collator."""
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = tok.hf
    args = type("Args", (), {"dataset_num_proc": None, "max_length": None, "truncation_mode": "keep_start"})
    [example] = list(trainer._prepare_dataset(Dataset.from_list([row]), tok.hf, args, "train"))
    batch = DataCollatorForPreference(pad_token_id=0)([example])
    found = []
    for ids, seen, mask in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        found.append((ids[seen == 1].tolist(), mask[seen == 1].tolist()))
    return found


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: json.dumps(row)[:40])
def test_tokens_and_targets_are_those_of_trl(tokenizer_folder: str, row: dict[str, Any]) -> None:
    tok = Tokeniser(tokenizer_folder)
    found = tokenise(to_table([(0, 0, parse_row(row))]), tok)
    assert found.bad == [] and found.groups is not None and found.groups.tolist() == [2]
    cuts = np.cumsum(found.documents.lens)[:-1]
    ids, labels = np.split(found.documents.input_ids, cuts), np.split(found.documents.labels, cuts)
    ours = [(i.tolist(), (j != IGNORE_INDEX).astype(int).tolist()) for i, j in zip(ids, labels, strict=True)]
    assert ours == of_trl(row, tok)


def test_the_prompt_of_written_out_conversations_is_found_as_trl_finds_it() -> None:
    row = {"prompt": "is 7 odd?", "chosen": [USER, YES], "rejected": [USER, NO]}
    prompt = maybe_extract_prompt(row)["prompt"]
    spans = parse_row(row).spans
    assert [span.text for span in spans] == [*(m["content"] for m in prompt), "yes", "no, it is even"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": [USER], "chosen": [], "rejected": [NO]}, "`chosen` is not a list of messages"),
        ({"chosen": [YES], "rejected": [NO]}, "no message in common"),
        ({"chosen": "yes", "rejected": "no"}, "no beginning in common"),
        ({"prompt": "q", "chosen": "", "rejected": "no"}, "the text to learn is empty"),
        (
            {"prompt": [USER], "chosen": [{**YES, "weight": 0}], "rejected": [NO]},
            "`chosen` has no text to learn",
        ),
    ],
)
def test_pairs_of_no_use(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        parse_row(value)


def test_answers_may_call_tools_and_take_several_messages(tmp_path: Path) -> None:
    """Only the assistant's messages are learnt, each up to its end of turn."""
    hf = byte_tokenizer(tmp_path)
    hf.chat_template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls else '' }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "odd", "arguments": "{}"}}],
    }
    row = {
        "tools": [{"name": "odd"}],
        "chosen": [USER, call, {"role": "tool", "content": "true"}, YES],
        "rejected": [USER, NO],
    }
    tok = Tokeniser(str(tmp_path), hf)
    found = tokenise(to_table([(0, 0, parse_row(row))]), tok)
    assert found.bad == []
    parts = np.split(found.documents.labels, np.cumsum(found.documents.lens)[:-1])
    learnt = [hf.decode(labels[labels != IGNORE_INDEX]) for labels in parts]
    assert (
        learnt[0].endswith("<|end|>yes<|end|>") and '"name": "odd"' in learnt[0] and "true" not in learnt[0]
    )
    assert learnt[1] == "no, it is even<|end|>"
    texts = [
        hf.decode(ids) for ids in np.split(found.documents.input_ids, np.cumsum(found.documents.lens)[:-1])
    ]
    assert texts[0].startswith('[{"') and texts[1].startswith('[{"'), "both are told of the tools"


def test_overlong_pairs_go_whole_or_lose_the_same_context(tokenizer_folder: str) -> None:
    tok = Tokeniser(tokenizer_folder)
    rows = [
        {"prompt": "0123456789", "chosen": "ab", "rejected": "cde"},  # 13 + 14 tokens
        {"prompt": "01", "chosen": "a" * 12, "rejected": "c" * 12},  # 15 + 15
        {"prompt": "0", "chosen": "a", "rejected": "b"},
    ]
    found = tokenise(to_table((i, i, parse_row(row)) for i, row in enumerate(rows)), tok)
    for policy in ("split", "reject"):
        fitted = fit(found, 20, policy)
        assert (fitted.rows, fitted.split, fitted.filtered) == (1, 0, {"overlong": 2})
        assert fitted.pieces.lens.tolist() == [3, 3] and fitted.groups.tolist() == [2]
    fitted = fit(found, 20, "truncate_left")
    assert (fitted.rows, fitted.truncated, fitted.filtered) == (2, 1, {"overlong_reply": 1})
    kept = [
        tok.hf.decode(found.documents.input_ids[start : start + length])
        for start, length in zip(fitted.pieces.starts, fitted.pieces.lens, strict=True)
    ]
    assert kept == ["456789ab<|end|>", "456789cde<|end|>", "0a<|end|>", "0b<|end|>"]


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_reach_a_batch_whole(
    packing: bool, config: Config, write_rows: WriteRows, tokenizer_folder: str
) -> None:
    rows = [
        {"prompt": f"{i}: ", "chosen": "y" * (i % 7 + 1), "rejected": "n" * (i % 5 + 1)} for i in range(60)
    ]
    folder = prepare_local(config(write_rows(rows), packing=packing), tokenizer_folder)
    shards, tok = Shards(folder), Tokeniser(tokenizer_folder)
    assert shards.manifest["pairs"] is True and shards.manifest["counts"]["pairs"] == 60
    order, seen = Order(len(shards), 4, 0), []
    for step in range(-(-len(shards) // 4)):
        indices = order.part(step, 0, 1).tolist()
        batch = collate([shards.row(i) for i in indices], indices)
        sizes, bounds = batch.group_lens.tolist(), batch.cu_seq_lens.tolist()
        assert sum(sizes) == len(bounds) - 1 and set(sizes) == {2}
        texts = [tok.hf.decode(batch.input_ids[0, a:b]) for a, b in pairwise(bounds)]
        seen += [tuple(texts[i : i + 2]) for i in range(0, len(texts), 2)]
    wanted = {
        (f"{row['prompt']}{row['chosen']}<|end|>", f"{row['prompt']}{row['rejected']}<|end|>") for row in rows
    }
    assert set(seen) == wanted
    assert {document.side for document in documents(shards)} == {"chosen", "rejected"}


def test_a_batch_may_hold_a_row_of_padding(
    config: Config, write_rows: WriteRows, tokenizer_folder: str
) -> None:
    folder = prepare_local(config(write_rows([PAIRS[0]])), tokenizer_folder)
    batch = collate([Shards(folder).row(0), padding_row()], [0, -1])
    assert batch.group_lens.tolist() == [2, 1] and len(batch.cu_seq_lens) == 4


def test_pairs_and_other_rows_are_refused_together(
    config: Config, write_rows: WriteRows, tokenizer_folder: str
) -> None:
    path = write_rows([*PAIRS[:3], {"text": "plain"}])
    with pytest.raises(DataError, match="3 of 4 rows are of the shape preference, the others are not"):
        prepare_local(config(path), tokenizer_folder)


def test_ordinary_rows_are_groups_of_one(
    config: Config, write_rows: WriteRows, tokenizer_folder: str
) -> None:
    shards = Shards(prepare_local(config(write_rows([{"text": "ab"}, {"text": "c"}])), tokenizer_folder))
    assert shards.manifest["pairs"] is False
    assert shards.row(0).group_lens.tolist() == [1, 1]
    check_kind(shards.manifest, pairs=False, objective="sft")
    with pytest.raises(DataError, match="`dpo` compares answers, and the rows hold no `chosen`") as caught:
        check_kind(shards.manifest, pairs=True, objective="dpo")
    assert "\n" not in str(caught.value)
