"""One answer among those of a request: from the engine's outputs to what the client is shown of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftray.engine.api import Output, TokenLogprob
from ftray.serve.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from ftray.serve.toolcalls import ToolCalls


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one output adds to an answer."""

    text: str = ""
    logprobs: dict[str, Any] | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.text or self.logprobs or self.tool_calls or self.finish_reason)


@dataclass(frozen=True, kw_only=True)
class Echo:
    """A prompt that is repeated in front of its answer."""

    text: str
    prompt_ids: Sequence[int]
    logprobs: bool


class Choice:
    """One answer as it grows.

    Args:
        index: its number in the response.
        texts: the tokens' texts.
        chat: whether log-probabilities have the form of chat completions.
        echo: the prompt to put in front of it.
        tool_calls: finds calls in it, if there are tools.
    """

    def __init__(
        self,
        index: int,
        texts: TokenTexts,
        *,
        chat: bool,
        echo: Echo | None = None,
        tool_calls: ToolCalls | None = None,
    ) -> None:
        self.index = index
        self.finished = False
        self._texts = texts
        self._chat = chat
        self._echo = echo
        self._tools = tool_calls
        self._offset = 0
        self._pieces: list[Piece] = []

    def feed(
        self, output: Output, *, keep: bool, prompt_logprobs: Sequence[TokenLogprob | None] | None
    ) -> Piece:
        """What an output adds.

        Args:
            output: from the engine.
            keep: whether `whole` will be asked for.
            prompt_logprobs: of the prompt's tokens, for an echo; they come with the first output alone.
        """
        text, reason = output.text, output.finish_reason
        calls: list[dict[str, Any]] = []
        if self._tools:
            text = self._tools.feed(text)
            if reason:
                rest, calls = self._tools.finish()
                text += rest
        logprobs = self._logprobs(output, prompt_logprobs)
        if self._echo:
            text, self._echo = self._echo.text + text, None
        self.finished = reason is not None
        piece = Piece(
            text=text, logprobs=logprobs, tool_calls=calls, finish_reason="tool_calls" if calls else reason
        )
        if keep:
            self._pieces.append(piece)
        return piece

    def whole(self) -> Piece:
        """Everything that was kept, in one piece."""
        return Piece(
            text="".join(piece.text for piece in self._pieces),
            logprobs=_joined([piece.logprobs for piece in self._pieces if piece.logprobs]),
            tool_calls=[call for piece in self._pieces for call in piece.tool_calls],
            finish_reason=self._pieces[-1].finish_reason,
        )

    def _logprobs(
        self, output: Output, prompt: Sequence[TokenLogprob | None] | None
    ) -> dict[str, Any] | None:
        if self._chat:
            return chat_logprobs(output.logprobs, self._texts) if output.logprobs else None
        entries: list[tuple[int, TokenLogprob | None]] = []
        if self._echo and self._echo.logprobs and prompt is not None:
            entries += zip(self._echo.prompt_ids, prompt, strict=True)
        entries += [(entry.token_id, entry) for entry in output.logprobs or ()]
        if not entries:
            return None
        found = completion_logprobs(entries, self._texts, self._offset)
        self._offset = found["text_offset"][-1] + len(found["tokens"][-1])
        return found


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Lists of several pieces end to end."""
    if not parts:
        return None
    joined: dict[str, Any] = {}
    for name, value in parts[0].items():
        joined[name] = None if value is None else [item for part in parts for item in part[name]]
    return joined
