"""From messages and texts to tokens, by the base's own tokenizer and chat template and nothing a client sends."""

import asyncio
import threading
from typing import Any

from jinja2 import TemplateError

from ftray.core.errors import RequestError
from ftray.serve.schema import ChatBody, CompletionBody

_INLINE_CHARS = 20_000


class Prompts:
    """Renders and tokenises prompts; long ones outside the event loop."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    async def tokens(self, body: ChatBody | CompletionBody) -> list[int]:
        """A request's prompt tokens.

        Raises:
            RequestError: if the base has no chat template, the template refuses the messages, or a token id does
                not exist.
        """
        if isinstance(body, ChatBody):
            messages = [message.plain() for message in body.messages]
            size = sum(len(message["content"]) for message in messages)
            return await self._run(size, self._render, messages)
        prompt = body.prompt_of_one()
        if isinstance(prompt, str):
            return await self._run(len(prompt), self._encode, prompt)
        vocabulary = len(self._tokenizer)
        if any(not 0 <= token < vocabulary for token in prompt):
            raise RequestError(f"prompt: token ids are 0 to {vocabulary - 1} here", param="prompt")
        return prompt

    async def _run(self, size: int, function: Any, argument: Any) -> list[int]:
        if size <= _INLINE_CHARS:
            result: list[int] = function(argument)
        else:
            result = await asyncio.to_thread(function, argument)
        return result

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            return list(self._tokenizer.encode(text))

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise RequestError(
                "messages: this base has no chat template; use /v1/completions", param="messages"
            )
        try:
            with self._lock:
                ids = self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
        except TemplateError as error:
            # Templates refuse in their own words, for example that roles must alternate.
            reason = str(error).encode("utf-8", "replace").decode()[:200]
            raise RequestError(
                f"messages: the chat template refuses them: {reason}", param="messages"
            ) from None
        return list(ids)
