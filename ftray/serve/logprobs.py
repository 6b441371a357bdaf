"""OpenAI's two forms of log-probabilities, and the text of single tokens that they name."""

import functools
from collections.abc import Sequence
from typing import Any

from ftray.engine.request import TokenLogprob

_FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot spell; OpenAI's own."""


class TokenTexts:
    """The text of each token of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_of = _byte_alphabet() if backend and "ByteLevel" in repr(backend.decoder) else {}
        self._added = set(getattr(tokenizer, "all_special_ids", ())) if backend else set()
        self.spelled = functools.lru_cache(maxsize=65_536)(self._spelled)

    def _spelled(self, token_id: int) -> tuple[str, list[int] | None]:
        """A token's text, and its bytes. Part of a character is written out, as `bytes:\\xe2\\x82`."""
        data = self._bytes(token_id)
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)

    def _bytes(self, token_id: int) -> bytes:
        if not hasattr(self._tokenizer, "convert_ids_to_tokens"):
            return bytes([token_id]) if token_id < 256 else b""
        token = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if self._byte_of and token_id not in self._added and all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """As `choices[].logprobs` of chat completions has them."""
    content = []
    for entry in entries:
        top = [_chat_entry(token, value, texts) for token, value in entry.top]
        content.append(_chat_entry(entry.token_id, entry.logprob, texts) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text, data = texts.spelled(token_id)
    return {"token": text, "logprob": max(logprob, _FLOOR), "bytes": data}


def completion_logprobs(
    entries: Sequence[tuple[int, TokenLogprob | None]], texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """As `choices[].logprobs` of completions has them.

    Args:
        entries: each token and what is known of it; None for the first of a prompt.
        texts: the tokens' texts.
        offset: characters that stand before the first of them.
    """
    tokens, offsets = [], []
    for token_id, _ in entries:
        text, _data = texts.spelled(token_id)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else max(entry.logprob, _FLOOR) for _, entry in entries],
        "top_logprobs": [None if entry is None else _top(entry, texts) for _, entry in entries],
        "text_offset": offsets,
    }


def _top(entry: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    """The most likely tokens and the one that stands there; of two with one text the more likely."""
    found: dict[str, float] = {}
    for token_id, value in (*entry.top, (entry.token_id, entry.logprob)):
        text, _ = texts.spelled(token_id)
        found[text] = max(found.get(text, _FLOOR), value)
    return found


def _byte_alphabet() -> dict[str, int]:
    """Characters by which byte-level tokenizers write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}
