"""OpenAI's response objects, built as plain data."""

import time
from dataclasses import dataclass, field
from typing import Any

from ftray.core.errors import RequestError
from ftray.serve.backend import ServedModel

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Reply:
    """What is the same in every chunk of one answer."""

    id: str
    model: ServedModel
    chat: bool
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def headers(self) -> dict[str, str]:
        """Headers that say what answered."""
        return {"x-ftray-digest": self.model.digest}

    def whole(self, text: str, finish_reason: str, completion_tokens: int) -> dict[str, Any]:
        """A complete answer."""
        content = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.chat
            else {"text": text}
        )
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, [choice]) | {"usage": self.usage(completion_tokens)}

    def chunk(
        self, text: str | None, finish_reason: str | None = None, *, role: bool = False
    ) -> dict[str, Any]:
        """A piece of a stream."""
        delta: dict[str, str] = ({"role": "assistant"} if role else {}) | (
            {"content": text} if text is not None else {}
        )
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": text or ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """The last piece of a stream that was asked for token counts."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._object(kind, []) | {"usage": self.usage(completion_tokens)}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Token counts."""
        total = self.prompt_tokens + completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": total,
        }

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model.id,
            "system_fingerprint": self.model.digest,
            "choices": choices,
        }


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
