"""Shapes: what each becomes as spans, and how conversations with tools reach a chat template."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from ftray.config.recipe import DataConfig, RowField
from ftray.core.errors import ConfigError, DataError
from ftray.core.spec import parse
from ftray.data.messages import conversation
from ftray.data.rows import BadRow, parse_line, parse_row, to_table
from ftray.data.shapes import FIELDS
from ftray.data.spans import Row, Span
from ftray.data.tokenise import Tokeniser, tokenise
from ftray.testing.tiny import byte_tokenizer

USER = {"role": "user", "content": "q"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}


def kinds(row: Row) -> list[tuple[str, str, bool]]:
    return [(span.kind, span.text, span.target) for span in row.spans]


CHAT = [("user", "q", False), ("assistant", "yes", True)]


@pytest.mark.parametrize(
    ("value", "shape", "spans"),
    [
        ({"text": "a"}, "text", [("text", "a", True)]),
        ({"messages": [USER, YES]}, "messages", CHAT),
        ({"messages": json.dumps([USER, YES])}, "messages", CHAT),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}]},
            "sharegpt",
            CHAT,
        ),
        ({"conversations": [USER, YES], "system": "be"}, "sharegpt", [("system", "be", False), *CHAT]),
        ({"instruction": "q", "output": "yes"}, "alpaca", CHAT),
        (
            {"instruction": "q", "input": "in", "output": "yes", "system": "be", "history": [["a", "b"]]},
            "alpaca",
            [
                ("system", "be", False),
                ("user", "a", False),
                ("assistant", "b", True),
                ("user", "q\nin", False),
                ("assistant", "yes", True),
            ],
        ),
        ({"prompt": [USER], "completion": [YES]}, "prompt_completion", CHAT),
        (
            {"prompt": [USER, NO, USER], "completion": [YES]},
            "prompt_completion",
            [CHAT[0], ("assistant", "no", False), *CHAT],
        ),
        ({"prompt": "q", "completion": [YES]}, "prompt_completion", CHAT),
        (
            {"prompt": "q", "completion": "yes", "label": 3},
            "prompt_completion",
            [("prompt", "q", False), ("completion", "yes", True)],
        ),
        (
            {"prompt": "q", "chosen": "yes", "rejected": "no"},
            "preference",
            [("prompt", "q", False), ("chosen", "yes", True), ("rejected", "no", True)],
        ),
        (
            {"chosen": [USER, YES], "rejected": [USER, NO]},
            "preference",
            [("user", "q", False), ("chosen", "yes", True), ("rejected", "no", True)],
        ),
        (
            {"prompt": "q", "chosen": [USER, YES], "rejected": [USER, NO]},
            "preference",
            [("user", "q", False), ("chosen", "yes", True), ("rejected", "no", True)],
        ),
        (
            {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
            "preference",
            [("user", "q", False), ("chosen", "yes", True), ("rejected", "no", True)],
        ),
        (
            {"prompt": "q", "completion": "yes", "label": True},
            "completion_label",
            [("prompt", "q", False), ("desirable", "yes", True)],
        ),
        ({"completion": "no", "label": "False"}, "completion_label", [("undesirable", "no", True)]),
    ],
)
def test_shapes(value: dict[str, Any], shape: str, spans: list[tuple[str, str, bool]]) -> None:
    row = parse_row(value)
    assert (row.shape, kinds(row)) == (shape, spans)
    assert row.is_chat == (spans[0][0] in ("user", "system"))
    assert row.is_group == (shape in ("preference", "completion_label"))
    # Through the table of rows nothing is lost.
    (stored,) = to_table([(0, 0, row)])["spans"].to_pylist()
    assert tuple(Span(**span) for span in stored) == row.spans


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"conversations": []}, "`conversations` is not a list"),
        ({"conversations": ["a"]}, "a message is not an object"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "`role` is none of"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "`role` is none of"),
        ({"messages": "[{"}, "`messages` is a string that is not JSON"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "`content` is not text"),
        ({"messages": [USER, {**YES, "tool_calls": [3]}]}, "`tool_calls` is not a list of objects"),
        ({"messages": [USER, {**YES, "tool_calls": [{"function": {}}]}]}, "no function `name`"),
        (
            {"messages": [USER, {**YES, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "`arguments` are not JSON",
        ),
        ({"messages": [USER, YES], "tools": "nothing"}, "`tools` is a string that is not JSON"),
        ({"messages": [USER, YES], "tools": [1]}, "`tools` is not a list of objects"),
        ({"instruction": "q", "output": None}, "`content` is not text"),
        ({"instruction": "q", "output": "a", "history": [["one"]]}, "`history` is not a list of pairs"),
        ({"chosen": "a", "rejected": "b"}, "there is no `prompt`"),
        (
            {"prompt": "q", "chosen": [USER, YES], "rejected": [USER]},
            "does not go on with an assistant message",
        ),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [NO]},
            "`chosen` does not go on with",
        ),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "`chosen` is not a string"),
        ({"completion": "a"}, "no `messages`"),
    ],
)
def test_rows_of_no_use(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        parse_row(value)


def test_a_key_that_stands_twice() -> None:
    with pytest.raises(BadRow, match="a key stands twice"):
        parse_line(b'{"text": "a", "text": "b"}')
    with pytest.raises(BadRow, match="a key stands twice"):
        parse_line(b'{"text": "a", "meta": {"x": 1, "x": 2}}')


def test_columns_name_what_is_read() -> None:
    value = {"question": "q", "answer": "a", "chosen": "x", "rejected": "y", "prompt": "p"}
    row = parse_row(value, {"prompt": "question", "completion": "answer"})
    assert kinds(row) == [("prompt", "q", False), ("completion", "a", True)]
    assert parse_row(value, {"prompt": "prompt", "completion": "chosen"}).shape == "prompt_completion"
    with pytest.raises(BadRow, match="no column `reply`"):
        parse_row(value, {"prompt": "question", "completion": "reply"})
    with pytest.raises(BadRow, match="make no known shape"):
        parse_row(value, {"prompt": "question"})


TOOL = {
    "name": "weather",
    "description": "é",
    "parameters": {"type": "object", "properties": {"a": {"b": {"c": []}}}},
}
CALLS = [
    {"role": "user", "content": "rain?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "look it up",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": {"b": 1}}'}}
        ],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "wet"},
    YES,
]
TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m['role'] }}>"
    "{{ m.get('reasoning_content', '') }}{{ m['content'] }}"
    "{% if m.get('tool_calls') %}{{ m['tool_calls'] | tojson }}{% endif %}{{ m.get('tool_call_id', '') }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tok(folder: Path, template: str) -> Tokeniser:
    tokenizer = byte_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return Tokeniser(str(folder))


def test_tools_and_calls_reach_the_template(tmp_path: Path) -> None:
    row = parse_row({"messages": CALLS, "tools": json.dumps([TOOL])})
    turns, tools = conversation(row.spans)
    assert tools == [{"type": "function", "function": TOOL}]
    assert [turn.target for turn in turns] == [False, True, False, True]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"a": {"b": 1}}}}
    assert turns[1].message["tool_calls"] == [call] and turns[1].message["content"] == ""
    assert turns[2].message["name"] == "weather"
    (document,) = tok(tmp_path, TEMPLATE).documents(row)
    shown = "".join(f"{{{part.text}}}" if part.weight else part.text for part in document)
    assert shown == (
        '[[{"type": "function", "function": '
        + json.dumps(TOOL, ensure_ascii=False)
        + "}]]<user>rain?<assistant>"
        "{look it up" + json.dumps([call]) + "<|end|>}<tool>wet1<assistant>{yes<|end|>}"
    )


def test_sharegpt_calls() -> None:
    turns = [
        {"from": "human", "value": "rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "wet"},
        {"from": "gpt", "value": "yes"},
    ]
    found, tools = conversation(parse_row({"conversations": turns, "tools": "[]"}).spans)
    assert tools is None
    assert [turn.message["role"] for turn in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1].message["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"a": 1}}
    assert [turn.target for turn in found] == [False, True, False, True]


def test_a_template_that_leaves_tools_out_is_told(tmp_path: Path) -> None:
    rows = to_table(
        [
            (0, 0, parse_row({"messages": [USER, YES], "tools": [TOOL]})),
            (1, 1, parse_row({"messages": CALLS[:2]})),
            (2, 2, parse_row({"messages": [USER, YES]})),
        ]
    )
    plain = TEMPLATE.replace("{{ tools | tojson }}", "").replace("{{ m['tool_calls'] | tojson }}", "")
    found = tokenise(rows, tok(tmp_path, plain))
    assert [reason for _, reason in found.bad] == [
        "the chat template leaves `tools` out",
        "the chat template leaves `tool_calls` out",
    ]
    assert len(found.documents.lens) == 1


def test_judged_answers_are_refused(tokenizer_folder: str) -> None:
    row = parse_row({"prompt": "q", "completion": "yes", "label": True})
    with pytest.raises(DataError, match=r"completion_label .* completion: completion}") as caught:
        tokenise(to_table([(0, 0, row)]), Tokeniser(tokenizer_folder))
    assert "\n" not in str(caught.value)


def test_columns_can_name_every_field_of_every_shape() -> None:
    assert get_args(RowField) == FIELDS
    assert DataConfig(train="a", columns={"prompt": "question"}).columns == {"prompt": "question"}
    with pytest.raises(ConfigError, match="columns"):
        parse(DataConfig, {"train": "a", "columns": {"promt": "question"}})
