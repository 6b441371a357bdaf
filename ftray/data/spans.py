"""What every row becomes before tokenising: typed spans of text, each learnt or not."""

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = ("reasoning_content", "reasoning", "thinking", "tool_calls", "tool_call_id", "name")
"""What a message may hold besides its content, under the names that chat templates read."""
TOOLS = "tools"
PAIR, LABELLED = "preference", "completion_label"


class BadRow(Exception):
    """Why a row is quarantined; the text names no value of the row, so that equal reasons can be counted."""


@dataclass(frozen=True)
class Span:
    """A piece of a row's text."""

    kind: str
    """What it is.

    `text`, `prompt` or `completion`; the role of a message, which spans of `MESSAGE_FIELDS` follow (`tool_calls` as
    JSON); `tools` (JSON), before the messages; `chosen` and `rejected`, or `desirable` or `undesirable` (in a
    conversation: the assistant message that the answer begins with).
    """
    text: str
    """The characters."""
    target: bool
    """True if the model learns to produce it."""
    weight: float = 1.0
    """Weight of its tokens in the loss."""


@dataclass(frozen=True)
class Row:
    """One parsed row."""

    shape: str
    """The name of its shape (`ftray.data.shapes`)."""
    spans: tuple[Span, ...]
    """Its pieces in order."""

    @property
    def is_chat(self) -> bool:
        """True if it is a conversation, which a chat template renders."""
        return any(span.kind in ROLES for span in self.spans)

    @property
    def is_group(self) -> bool:
        """True if its answers are to be compared or judged, not each learnt."""
        return self.shape in (PAIR, LABELLED)


def checked(text: str) -> str:
    """The text itself. Raises `BadRow` if it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("a lone surrogate, which no UTF-8 text can hold") from None
    return text


def text_of(mapping: dict[str, Any], key: str) -> str:
    """The string under a key. Raises `BadRow` if it is something else."""
    value = mapping[key]
    if not isinstance(value, str):
        raise BadRow(f"`{key}` is not a string")
    return checked(value)
