"""The shapes of rows that are recognised, by the fields that stand in a row; the first that fits is taken.

A new shape is one function and one line of `SHAPES`. Fields of other names are left alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ftray.data.messages import from_sharegpt, read_messages, tools_span
from ftray.data.spans import LABELLED, PAIR, TOOLS, BadRow, Row, Span, text_of

Value = dict[str, Any]


def _text(value: Value) -> list[Span]:
    return [Span("text", text_of(value, "text"), True)]


def _messages(value: Value) -> list[Span]:
    return [*tools_span(value.get(TOOLS)), *read_messages(value["messages"])]


def _sharegpt(value: Value) -> list[Span]:
    messages = [*_system(value), *from_sharegpt(value["conversations"])]
    return [*tools_span(value.get(TOOLS)), *read_messages(messages, "conversations")]


def _alpaca(value: Value) -> list[Span]:
    asked = text_of(value, "instruction")
    if value.get("input"):
        asked = f"{asked}\n{text_of(value, 'input')}"
    answer = {"role": "assistant", "content": value["output"]}
    messages = [*_system(value), *_history(value), {"role": "user", "content": asked}, answer]
    return [*tools_span(value.get(TOOLS)), *read_messages(messages)]


def _system(value: Value) -> list[Value]:
    return [{"role": "system", "content": value["system"]}] if value.get("system") else []


def _history(value: Value) -> list[Value]:
    """LLaMA-Factory's `history`: pairs of a question and its answer."""
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise BadRow("`history` is not a list of pairs")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)
    ]


def _prompt_completion(value: Value) -> list[Span]:
    completion = value["completion"]
    if isinstance(completion, list):
        return [*_prompt(value, chat=True), *read_messages(completion, "completion")]
    return [*_prompt(value), Span("completion", text_of(value, "completion"), True)]


def _prompt(value: Value, *, chat: bool = False) -> list[Span]:
    """The context: one text (the user's, before messages), or TRL's list of messages."""
    if isinstance(value["prompt"], list):
        return [*tools_span(value.get(TOOLS)), *read_messages(value["prompt"], "prompt", learn=False)]
    return [Span("user" if chat else "prompt", text_of(value, "prompt"), False)]


def _preference(value: Value) -> list[Span]:
    chosen, rejected = value["chosen"], value["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _chat_pair(value, chosen, rejected)
    texts, shared = [text_of(value, kind) for kind in ("chosen", "rejected")], 0
    if value.get("prompt") is not None:
        prompt = _prompt(value)
    elif shared := _shared(*texts):
        prompt = [Span("prompt", texts[0][:shared], False)]
    else:
        raise BadRow("`chosen` and `rejected` have no beginning in common, and there is no `prompt`")
    answers = zip(("chosen", "rejected"), texts, strict=True)
    return [*prompt, *(Span(kind, text[shared:], True) for kind, text in answers)]


def _chat_pair(value: Value, chosen: list[Any], rejected: list[Any]) -> list[Span]:
    prompt: list[Span] = []
    if value.get("prompt") is not None:
        prompt = [span for span in _prompt(value, chat=True) if span.kind != TOOLS]
    # Both conversations may be written out from their start; what they share is then the prompt. Answers that
    # follow a prompt may begin alike, which does not make it longer.
    repeats = not prompt or (
        bool(chosen) and isinstance(chosen[0], dict) and chosen[0].get("role") != "assistant"
    )
    shared = _shared(chosen, rejected) if repeats else 0
    if shared:
        common = read_messages(chosen[:shared], "chosen", learn=False)
        prompt = common if len(common) >= len(prompt) else [*prompt, *common]
    if not prompt:
        raise BadRow("`chosen` and `rejected` have no message in common, and there is no `prompt`")
    answers = [*_answer(chosen[shared:], "chosen"), *_answer(rejected[shared:], "rejected")]
    return [*tools_span(value.get(TOOLS)), *prompt, *answers]


def _shared(chosen: Any, rejected: Any) -> int:
    """Length of the common beginning, a prompt that is not written apart; as TRL's `extract_prompt`."""
    longest = min(len(chosen), len(rejected)) - 1
    for index in range(longest + 1):
        if chosen[index] != rejected[index]:
            # A space before the first difference belongs to the answers.
            return index - (index > 0 and chosen[index - 1] == " ")
    return max(0, longest)


def _answer(messages: list[Any], kind: str) -> list[Span]:
    """What follows the prompt of a conversation, its first message as a span of a kind."""
    spans = read_messages(messages, kind)
    if spans[0].kind != "assistant":
        raise BadRow(f"`{kind}` does not go on with an assistant message after the prompt")
    if not any(span.target for span in spans):
        raise BadRow(f"`{kind}` has no text to learn")
    return [replace(spans[0], kind=kind), *spans[1:]]


def _labelled(value: Value) -> list[Span]:
    chat = isinstance(value["completion"], list)
    prompt = _prompt(value, chat=chat) if value.get("prompt") is not None else []
    kind = "desirable" if _as_bool(value["label"]) else "undesirable"
    if chat:
        return [*prompt, *_answer(value["completion"], kind)]
    return [*prompt, Span(kind, text_of(value, "completion"), True)]


def _as_bool(label: Any) -> bool | None:
    """A truth value, also as text files write it; None: something else."""
    if isinstance(label, str):
        return {"true": True, "false": False}.get(label.lower())
    return label if isinstance(label, bool) else None


@dataclass(frozen=True)
class Shape:
    """One shape of rows."""

    fields: tuple[str, ...]
    """What a row must have to be of it."""
    read: Callable[[Value], list[Span]]
    """Its spans; raises `BadRow`."""
    also: tuple[str, ...] = ()
    """What it may have besides."""


SHAPES: dict[str, Shape] = {
    "messages": Shape(("messages",), _messages, (TOOLS,)),
    "sharegpt": Shape(("conversations",), _sharegpt, ("system", TOOLS)),
    PAIR: Shape(("chosen", "rejected"), _preference, ("prompt", TOOLS)),
    LABELLED: Shape(("completion", "label"), _labelled, ("prompt", TOOLS)),
    "prompt_completion": Shape(("prompt", "completion"), _prompt_completion, (TOOLS,)),
    "alpaca": Shape(("instruction", "output"), _alpaca, ("input", "system", "history", TOOLS)),
    "text": Shape(("text",), _text),
}
FIELDS = tuple(sorted({field for shape in SHAPES.values() for field in (*shape.fields, *shape.also)}))
"""Every field that a shape reads."""


def parse_row(value: Value, columns: Mapping[str, str] | None = None) -> Row:
    """Recognise a row's shape.

    Args:
        value: the row.
        columns: fields of a shape and the columns that hold them; if given, other columns are left alone.

    Raises:
        BadRow: with the reason it cannot be used.
    """
    if columns:
        given, value = value, {field: value[name] for field, name in columns.items() if name in value}
    name = shape_of(value)
    if name is None and columns:
        absent = ", ".join(f"`{column}`" for column in columns.values() if column not in given)
        raise BadRow(f"no column {absent}" if absent else "the columns of `data.columns` make no known shape")
    if name is None:
        raise BadRow("no `messages`, `prompt` + `completion` or `text`")
    row = Row(name, tuple(SHAPES[name].read(value)))
    if not any(span.target for span in row.spans):
        raise BadRow("nothing to learn: no assistant message with a weight")
    if any(span.target and not span.text for span in row.spans):
        raise BadRow("the text to learn is empty")
    return row


def shape_of(value: Value) -> str | None:
    """The name of the first shape whose fields a row has."""
    has = value.keys()
    for fields, name in _BY_FIELDS:
        # A class number beside a completion is no judgement of it.
        if fields <= has and (name != LABELLED or _as_bool(value["label"]) is not None):
            return name
    return None


_BY_FIELDS = [(frozenset(shape.fields), name) for name, shape in SHAPES.items()]
