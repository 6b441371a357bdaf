"""Tokens to text as they come: whole characters only, and stop strings cut wherever they are split."""

from collections.abc import Sequence
from typing import Any, Protocol

_WINDOW = 16
_CONTEXT = 6
_INCOMPLETE = "�"
# A character has at most four bytes, and some tokenizers show one mark for each of the three it lacks the last of.
_MAX_OPEN = 3


class Decoder(Protocol):
    """The part of a tokenizer this needs."""

    def decode(self, token_ids: Sequence[int], **settings: Any) -> str:
        """Text of tokens."""
        ...


class Detokeniser:
    """Text of a growing list of tokens.

    A tokenizer decodes a token differently by what stands before it (a leading space, half an emoji), so each
    token is decoded with a window of earlier ones, and text that ends in an open character is held back. The
    joined increments equal decoding everything at once.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids[-_CONTEXT:])
        self._known = self._decode(self._window)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that is now certain."""
        self._window += token_ids
        text = self._decode(self._window)
        certain = text[: len(text) - min(_MAX_OPEN, _num_marks(text))]
        if not (new := certain[self._num_known(text) :]):
            return ""
        self._known = certain
        if len(self._window) > _WINDOW:
            self._window = self._window[-_CONTEXT:]
            tail = self._decode(self._window)
            self._known = tail[: len(tail) - (len(text) - len(certain))]
        return new

    def finish(self) -> str:
        """The rest at the end of the tokens, without a character that was never completed."""
        text = self._decode(self._window)
        new = text[: len(text) - _num_marks(text)][self._num_known(text) :]
        self._known = text
        return new

    def _num_known(self, text: str) -> int:
        """Characters of `text` that are not new. A prompt may end inside one, which then changes."""
        known = self._known
        return len(known) if text.startswith(known) else len(known) - _num_marks(known)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _num_marks(text: str) -> int:
    """Marks of broken characters at the end."""
    return len(text) - len(text.rstrip(_INCOMPLETE))


class StopStrings:
    """Holds text back while it may be the beginning of a stop string, and cuts it at the first met."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.met: str | None = None
        """The stop string that was met."""

    def feed(self, text: str) -> str:
        """Add text; returns what may be shown. Sets `met` when a stop string is complete."""
        if not self._stop or self.met is not None:
            return text if self.met is None else ""
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            first, self.met = min(found, key=lambda hit: hit[0])
            shown, self._held = self._held[:first], ""
            return shown
        keep = self._open_tail()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _open_tail(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = max(len(stop) for stop in self._stop) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0
