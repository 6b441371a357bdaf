"""Conversations through a tokenizer's chat template: what is context, what is learnt, what is only text.

Each answer is rendered on its own: what stands before it (with the generation prompt) is context, what it adds
up to its end-of-turn token is learnt. So a template needs no marks of its own, and the context is what a server
renders for the same messages. A template that rewrites earlier turns (that drops their reasoning, or ends the
last turn with another token) gives a conversation several documents, each answer in the context it will have.

A special token spelt out in a message is text of that message: it never ends a turn or opens one.
"""

import datetime
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftray.core.errors import DataError
from ftray.data.messages import conversation
from ftray.data.spans import BadRow, Span

# Private-use characters stand for special tokens' spellings while a template is rendered.
_FIRST_MARK, _LAST_MARK = 0xF0000, 0x10FFFD
TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""What a template that prints today's date prints, at training and at serving: the default of Llama 3's."""
_STRFTIME = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{TEMPLATE_DATE.strftime(f'%{code}')}')" for code in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}"
)
"""Takes the place of the function of that name that templates find, which tells today's date."""
_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
# A template is a program; on a row it was not written for it may fail in any of these ways.
_FAILURES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


@dataclass(frozen=True)
class Segment:
    """A piece of a document that is tokenised by itself."""

    text: str
    """The rendered characters."""
    weight: float = 0.0
    """Weight of its tokens in the loss; 0: context."""
    before: tuple[int, ...] = ()
    """Token ids put in front of it."""
    after: tuple[int, ...] = ()
    """Token ids put behind it."""
    literals: tuple[tuple[int, int], ...] = ()
    """Character ranges [start, stop) that spell a special token but are text."""

    def pieces(self) -> list[tuple[str, bool]]:
        """Its text cut at the literals; true marks a literal."""
        found, position = [], 0
        for start, stop in self.literals:
            found += [(self.text[position:start], False), (self.text[start:stop], True)]
            position = stop
        return [piece for piece in [*found, (self.text[position:], False)] if piece[0]]


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer.

    Args:
        hf: the tokenizer.
        folder: where it comes from, for messages.
    """

    def __init__(self, hf: Any, folder: str) -> None:
        self._hf = hf
        self._folder = folder
        added = hf.added_tokens_decoder.values()
        self._specials = {token.content for token in added if token.special} | {hf.eos_token}
        ends = {token.content for token in added} | self._specials
        self._last_token = re.compile(rf"({_any_of(ends).pattern})\s*\Z")

    def documents(self, spans: Sequence[Span]) -> list[list[Segment]]:
        """A conversation as documents of segments, every answer learnt in exactly one of them.

        Raises:
            BadRow: if the template refuses it or renders an answer so that it cannot be told from its context.
            DataError: if there is no template, or it can teach no model to end an answer.
        """
        self.check()
        texts, marks = self._mark([span.text for span in spans])
        turns, tools = conversation([replace(s, text=text) for s, text in zip(spans, texts, strict=True)])
        messages = [_as_served(turn.message) for turn in turns]
        documents: list[list[Segment]] = [[]]
        done = ""
        for number, turn in enumerate(turns):
            if not turn.target:
                continue
            context, answer = self._answer(messages[: number + 1], tools)
            _check_tools(tools, turn.message, context, answer)
            if not context.startswith(done):
                documents.append([])
                done = ""
            if len(context) > len(done):
                documents[-1].append(_segment(context[len(done) :], 0.0, marks))
            documents[-1].append(_segment(answer, turn.weight, marks))
            done = context + answer
        return documents

    def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> Segment:
        """The context of the answer that would follow: what a server encodes. Raises as `documents`."""
        # As JSON, so that no special token is read out of a tool's description or a call's arguments either.
        texts, marks = self._mark([json.dumps([messages, tools], ensure_ascii=False)])
        turns, marked_tools = json.loads(texts[0])
        context = self._render([_as_served(turn) for turn in turns], marked_tools, generation_prompt=True)
        if not all(_function_name(tool) in context for tool in marked_tools or []):
            raise BadRow("it leaves `tools` out")
        return _segment(context, 0.0, marks)

    def check(self) -> None:
        """Refuse a template that no conversation can be learnt with. Raises `DataError`, one line."""
        if problem := self._problem:
            raise DataError(f"{self._folder}: {problem}")

    @functools.cached_property
    def _problem(self) -> str:
        """What is wrong with the template, found with the shortest conversation; empty: nothing."""
        if self._hf.chat_template is None:
            return (
                "the tokenizer has no chat template, which rows of `messages` need; "
                "add `chat_template.jinja` or use `prompt` + `completion`"
            )
        try:
            _, answer = self._answer(_PROBE)
        except _Unfit as error:
            return f"{error}; mend `chat_template.jinja`"
        except BadRow:
            return ""  # it asks for more than this conversation has; the rows will tell
        if "answer" not in answer:
            return "the chat template leaves the answer out; mend `chat_template.jinja`"
        return ""

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """The special tokens' spellings, and that of the end of a turn even where its flag is missing."""
        try:
            end = self._last_token.search(self._answer(_PROBE)[1])
        except BadRow:
            end = None
        return _any_of(self._specials | ({end[1]} if end else set()))

    def _answer(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> tuple[str, str]:
        """What stands before the last message, and what that adds up to its end-of-turn token."""
        context = self._render(messages[:-1], tools, generation_prompt=True)
        whole = self._render(messages, tools, generation_prompt=False)
        if not whole.startswith(context):
            raise _Unfit("the chat template does not append: an answer does not follow its own prompt")
        answer = whole[len(context) :]
        if not self._last_token.search(answer):
            raise _Unfit(
                "the chat template ends an answer without a special token: nothing says where to stop"
            )
        return context, answer.rstrip()

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None = None, *, generation_prompt: bool
    ) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(
                self._hf.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    chat_template=self._undated(tools),
                )
            )
        except (TemplateError, *_FAILURES) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadRow(f"the chat template refuses it: {reason}") from None

    def _undated(self, tools: list[Any] | None) -> str | None:
        """The template with a date that is always the same, if it prints today's; None: as it is."""
        if "strftime_now" not in str(self._hf.chat_template):
            return None
        # What is behind the macro keeps a line break that a block would take from the template.
        return f"{_STRFTIME}{{{{ '' }}}}{self._hf.get_chat_template(tools=tools)}"

    def _mark(self, texts: list[str]) -> tuple[list[str], dict[str, str]]:
        """Texts with one character in place of each special token's spelling, and what each stands for."""
        found = sorted({match for text in texts for match in self._special.findall(text)})
        if not found:
            return texts, {}
        used = {ord(char) for text in texts for char in text}
        free = (chr(code) for code in range(_FIRST_MARK, _LAST_MARK) if code not in used)
        mark_of = dict(zip(found, free, strict=False))
        marked = [self._special.sub(lambda match: mark_of[match[0]], text) for text in texts]
        return marked, {mark: spelling for spelling, mark in mark_of.items()}


def _check_tools(tools: list[Any] | None, message: dict[str, Any], context: str, answer: str) -> None:
    """Refuse a conversation whose tools or calls its template does not show. Raises `BadRow`."""
    if not all(_function_name(tool) in context for tool in tools or []):
        raise BadRow("the chat template leaves `tools` out")
    if not all(_function_name(call) in answer for call in message.get("tool_calls", [])):
        raise BadRow("the chat template leaves `tool_calls` out")


def _function_name(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def _as_served(message: dict[str, Any]) -> dict[str, Any]:
    """`developer` is OpenAI's newer word for `system`, which templates know and the server renders."""
    return {**message, "role": "system"} if message["role"] == "developer" else message


class _Unfit(BadRow):
    """The template, not the row, is at fault."""


def _any_of(spellings: set[str]) -> re.Pattern[str]:
    """Any of some spellings, the longest first."""
    return re.compile("|".join(re.escape(item) for item in sorted(spellings, key=lambda x: (-len(x), x))))


def _segment(text: str, weight: float, marks: dict[str, str]) -> Segment:
    """A segment with the spellings back in the places of their marks."""
    if not any(mark in text for mark in marks):
        return Segment(text, weight)
    whole, literals = "", []
    for piece in re.split(f"([{''.join(marks)}])", text):
        spelling = marks.get(piece, piece)
        if piece in marks:
            literals.append((len(whole), len(whole) + len(spelling)))
        whole += spelling
    return Segment(whole, weight, literals=tuple(literals))
