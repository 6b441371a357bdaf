"""Conversations as spans, and spans as the messages that chat templates take.

A message is a span of its role; what else it holds (`MESSAGE_FIELDS`) follows as spans of its own, so that
transforms see every text that a template will render. Tool calls and tools travel as JSON.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ftray.data.spans import MESSAGE_FIELDS, ROLES, TOOLS, BadRow, Span, checked, text_of

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    message: dict[str, Any]
    """As a chat template takes it: `role`, `content` and the fields it has."""
    target: bool
    """True if the model learns to produce it."""
    weight: float
    """Weight of its tokens in the loss."""


def conversation(spans: Sequence[Span]) -> tuple[list[Turn], list[Any] | None]:
    """The messages that spans of a conversation stand for, and its tools.

    Raises:
        BadRow: if what was JSON is none any more.
    """
    turns: list[Turn] = []
    tools = None
    for span in spans:
        if span.kind == TOOLS:
            tools = _parsed(span)
        elif span.kind in MESSAGE_FIELDS and turns:
            value = _parsed(span) if span.kind == "tool_calls" else span.text
            last = turns[-1]
            turns[-1] = Turn(
                {**last.message, span.kind: value},
                last.target or span.target,
                last.weight if last.target or not span.target else span.weight,
            )
        else:
            turns.append(Turn({"role": span.kind, "content": span.text}, span.target, span.weight))
    return turns, tools


def _parsed(span: Span) -> Any:
    try:
        return json.loads(span.text)
    except ValueError:
        raise BadRow(f"a transform broke the JSON of `{span.kind}`") from None


def read_messages(messages: Any, key: str = "messages", *, learn: bool = True) -> list[Span]:
    """The spans of a list of messages; assistant messages with a weight above 0 are targets.

    Args:
        messages: the list, or its JSON.
        key: where it stands, for reasons.
        learn: False: nothing in it is a target.

    Raises:
        BadRow: if it is not a list of messages.
    """
    if isinstance(messages, str):
        messages = _json(messages, key)
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"`{key}` is not a list of messages")
    return [span for message in messages for span in _message(message, learn)]


def _message(message: Any, learn: bool) -> Iterator[Span]:
    if not isinstance(message, dict):
        raise BadRow("a message is not an object")
    role, weight = message.get("role"), message.get("weight")
    if role not in ROLES:
        raise BadRow("a message's `role` is none of " + ", ".join(ROLES))
    weight = 1 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
        raise BadRow("a message's `weight` is not a number of at least 0")
    fields = list(_fields(message))
    content = message.get("content")
    text = "" if content is None and any(kind == "tool_calls" for kind, _ in fields) else _content(content)
    target = learn and role == "assistant" and weight > 0
    # An answer that is nothing but calls or reasoning is learnt through these.
    yield Span(role, text, target and bool(text or not fields), float(weight))
    for kind, value in fields:
        yield Span(kind, value, target and kind not in ("name", "tool_call_id"), float(weight))


def _fields(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for kind in MESSAGE_FIELDS:
        value = message.get(kind)
        if value is None or value in ("", []):
            continue
        if kind == "tool_calls":
            yield kind, as_json(tool_calls(value))
        else:
            yield kind, text_of(message, kind)


def _content(content: Any) -> str:
    """A message's text: a string, or OpenAI's list of text parts."""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(text_of(part, "text") if "text" in part else "" for part in content)
    if not isinstance(content, str):
        raise BadRow("a message's `content` is not text")
    return checked(content)


def tool_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, arguments as an object where they are the JSON of one. Raises `BadRow`."""
    calls = _json(value, "tool_calls") if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow("`tool_calls` is not a list of objects")
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    function = inner if isinstance(inner, dict) else call
    if not isinstance(function.get("name"), str):
        raise BadRow("a tool call has no function `name`")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise BadRow("a tool call's `arguments` are not JSON") from None
    # Templates write the arguments as JSON: a string would be quoted twice.
    named = {"name": function["name"], "arguments": arguments}
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**known, "type": "function", "function": named}


def tools_span(value: Any) -> list[Span]:
    """A conversation's tools as a span, none if there are none. Raises `BadRow`."""
    if value is None or value in ("", [], "[]"):
        return []
    tools = _json(value, TOOLS) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("`tools` is not a list of objects")
    wrapped = [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]
    return [Span(TOOLS, as_json(wrapped), False)]


def as_json(value: Any) -> str:
    """JSON with every character as itself. Raises `BadRow` for what UTF-8 cannot hold."""
    try:
        return checked(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (RecursionError, TypeError, ValueError):
        raise BadRow("`tools` or `tool_calls` cannot be written as JSON") from None


def _json(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"`{key}` is a string that is not JSON") from None


def from_sharegpt(turns: Any) -> list[dict[str, Any]]:
    """ShareGPT's turns (`from`, `value`) as messages; turns with `role` and `content` stay as they are."""
    turns = _json(turns, "conversations") if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns:
        raise BadRow("`conversations` is not a list of messages")
    return list(_messages_of(turns))


def _messages_of(turns: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRow("a message is not an object")
        if "from" not in turn:
            yield turn
            continue
        sender, weight = turn["from"], turn.get("weight")
        if sender in ("function_call", "tool_call"):
            yield {"role": "assistant", "weight": weight, "tool_calls": turn.get("value")}
        else:
            role = _SHAREGPT_ROLES.get(sender, sender) if isinstance(sender, str) else None
            yield {"role": role, "weight": weight, "content": turn.get("value")}
