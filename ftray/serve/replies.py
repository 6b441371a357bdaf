"""OpenAI's response objects, built as plain data."""

import time
from dataclasses import dataclass, field
from typing import Any

from ftray.core.errors import RequestError
from ftray.serve.backend import ServedModel
from ftray.serve.choices import Choice, Piece

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


@dataclass
class Usage:
    """Tokens of one request, counted as they come."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """As OpenAI has it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class Reply:
    """What is the same in every chunk of one answer."""

    id: str
    model: ServedModel
    chat: bool
    usage: Usage
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def headers(self) -> dict[str, str]:
        """Headers that say what answered."""
        return {"x-ftray-digest": self.model.digest, "x-ftray-model": self.model.ref}

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """A complete answer."""
        rows = [self._choice(choice.index, choice.whole(), whole=True) for choice in choices]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, rows) | {"usage": self.usage.to_json()}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The piece of a chat's stream that says whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        return self._chunk([self._choice(index, piece, whole=False)])

    def usage_chunk(self) -> dict[str, Any]:
        """The last piece of a stream that was asked for token counts."""
        return self._chunk([]) | {"usage": self.usage.to_json()}

    def _choice(self, index: int, piece: Piece, *, whole: bool) -> dict[str, Any]:
        content: dict[str, Any]
        if not self.chat:
            content = {"text": piece.text}
        elif whole:
            text = piece.text or (None if piece.tool_calls else "")
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message | ({"tool_calls": piece.tool_calls} if piece.tool_calls else {})}
        else:
            content = {"delta": _delta(piece)}
        return {
            "index": index,
            **content,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._object("chat.completion.chunk" if self.chat else "text_completion", choices)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model.id,
            "system_fingerprint": self.model.digest,
            "choices": choices,
        }


def _delta(piece: Piece) -> dict[str, Any]:
    calls = [{"index": number, **call} for number, call in enumerate(piece.tool_calls)]
    return ({"content": piece.text} if piece.text else {}) | ({"tool_calls": calls} if calls else {})


def model_card(model: ServedModel, created: int) -> dict[str, Any]:
    """An entry of `/v1/models`; `ref` and `digest` are ours."""
    return {
        "id": model.id,
        "object": "model",
        "created": created,
        "owned_by": "ftray",
        "ref": model.ref,
        "digest": model.digest,
    }


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
