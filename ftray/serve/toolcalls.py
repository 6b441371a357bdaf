"""Tool calls in a reply: found in the text as it comes, so that a stream never shows the raw call.

Two ways of writing a call are known: JSON between `<tool_call>` tags (Hermes, Qwen, SmolLM and others), and a reply
that is nothing but JSON of one call or a list of them (Llama 3, Mistral). What looks like a call but names no given
tool stays text.
"""

import json
import uuid
from collections.abc import Collection
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_JSON_BEGINS = ("{", "[")


class ToolCalls:
    """Parts a reply into text and calls.

    Args:
        names: of the tools that may be called.
        single: whether at most one call is wanted.
    """

    def __init__(self, names: Collection[str], *, single: bool = False) -> None:
        self._names = frozenset(names)
        self._single = single
        self._held = ""
        self._at_start = True
        self._in_call = False

    def feed(self, text: str) -> str:
        """Add text; returns what is certainly no part of a call."""
        self._held += text
        if self._at_start:
            self._at_start = self._held.lstrip()[:1] in ("", *_JSON_BEGINS)
        if self._at_start or self._in_call:
            return ""
        at = self._held.find(_OPEN)
        self._in_call = at >= 0
        shown = at if self._in_call else len(self._held) - _open_tail(self._held)
        text, self._held = self._held[:shown], self._held[shown:]
        return text

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the calls in OpenAI's form."""
        held, self._held = self._held, ""
        before, tag, tagged = held.partition(_OPEN)
        pieces = _between_tags(tagged) if tag else [held]
        calls = [call for piece in pieces for call in self._calls(piece)]
        if not calls or None in calls:
            return held, []
        found = [call for call in calls if call is not None]
        return before if tag else "", found[:1] if self._single else found

    def _calls(self, text: str) -> list[dict[str, Any] | None]:
        """The calls a piece of JSON makes; None for what is none."""
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            return [None]
        return [self._call(item) for item in (parsed if isinstance(parsed, list) else [parsed])]

    def _call(self, item: Any) -> dict[str, Any] | None:
        if not isinstance(item, dict):
            return None
        name, arguments = item.get("name"), item.get("arguments", item.get("parameters", {}))
        if name not in self._names or not isinstance(arguments, dict):
            return None
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _between_tags(text: str) -> list[str]:
    """What stands in each pair of tags; the first has been opened. A last one that is not closed counts too."""
    pieces = [piece.partition(_CLOSE)[0] for piece in text.split(_OPEN)]
    return [piece.strip() for piece in pieces]


def _open_tail(text: str) -> int:
    """Length of the longest tail that begins a tag."""
    return next((size for size in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:size])), 0)
