"""From messages and texts to tokens, by the base's own tokenizer and chat template and nothing a client sends."""

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError

from ftray.core.errors import RequestError
from ftray.data.spans import BadRow
from ftray.data.tokenise import Tokeniser
from ftray.serve.logprobs import TokenTexts
from ftray.serve.schema import ChatBody, CompletionBody

T = TypeVar("T")

_PLAIN = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
_SHORT_CHARS = 20_000
_MESSAGE_CHARS = 20
"""What rendering a message costs, in characters to tokenise."""

_THREADS = [ThreadPoolExecutor(1, thread_name_prefix=f"ftray-prompts-{lane}") for lane in ("short", "long")]
"""One for each lane, for all fronts of a process."""


class _Lane:
    """One thread with a tokenizer of its own, which keeps state between calls and so takes one at a time."""

    def __init__(self, tokenizer: Any, thread: ThreadPoolExecutor) -> None:
        self._tokenizer, self._thread = tokenizer, thread
        # What renders training rows renders prompts, so that both see the same tokens, and a special token that a
        # client spells out stays text. The fake engine's byte tokenizer has no special tokens to spell.
        real = hasattr(tokenizer, "backend_tokenizer")
        self._rows = Tokeniser("the base", tokenizer) if real and tokenizer.chat_template else None

    async def text(self, prompt: str) -> list[int]:
        """Tokens of a plain prompt."""
        return await self._run(lambda: list(self._tokenizer.encode(prompt)))

    async def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation and the start of its answer."""
        return await self._run(lambda: _render(self._rows, self._tokenizer, messages, tools))

    async def spell(self, token_ids: list[int]) -> str:
        """Text of tokens."""
        return await self._run(lambda: str(self._tokenizer.decode(token_ids, **_PLAIN)))

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


class Prompts:
    """Renders and tokenises prompts, off the event loop; short ones do not wait for long ones."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts = TokenTexts(tokenizer)
        """Text of each token."""
        self.has_template = bool(tokenizer.chat_template)
        self._vocabulary = len(tokenizer)
        self._longest_token = max(len(token) for token in tokenizer.get_vocab())
        self._short, self._long = map(_Lane, (tokenizer, copy.deepcopy(tokenizer)), _THREADS)

    async def chat(self, body: ChatBody, max_length: int) -> list[int]:
        """A conversation's tokens.

        Args:
            body: the request.
            max_length: tokens the engine takes; what is longer beyond doubt is refused before any work.

        Raises:
            RequestError: if it is too long, the base has no chat template, or the template refuses the messages.
        """
        messages = [message.plain() for message in body.messages]
        tools = [tool.plain() for tool in body.active_tools]
        chars = sum(message.num_chars for message in body.messages) + sum(len(str(tool)) for tool in tools)
        self._check_length(len(messages), chars, max_length, "messages")
        return await self._lane(chars + _MESSAGE_CHARS * len(messages)).chat(messages, tools)

    async def completions(self, body: CompletionBody, max_length: int) -> list[list[int]]:
        """Tokens of every prompt. Raises `RequestError` if one is too long or a token id does not exist."""
        for prompt in body.prompts:
            parts, chars = (1, len(prompt)) if isinstance(prompt, str) else (len(prompt), 0)
            self._check_length(parts, chars, max_length, "prompt")
        return [await self._prompt(prompt) for prompt in body.prompts]

    async def spell(self, token_ids: list[int]) -> str:
        """Text of a prompt's tokens, for `echo`."""
        return await self._lane(_MESSAGE_CHARS * len(token_ids)).spell(token_ids)

    async def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self._lane(len(prompt)).text(prompt)
        if any(not 0 <= token < self._vocabulary for token in prompt):
            raise RequestError(
                f"prompt: token ids are 0 to {self._vocabulary - 1} here; use the base's tokenizer",
                param="prompt",
            )
        return prompt

    def _lane(self, size: int) -> _Lane:
        return self._short if size <= _SHORT_CHARS else self._long

    def _check_length(self, num_parts: int, num_chars: int, max_length: int, param: str) -> None:
        """Refuse what cannot fit: a message or id is at least a token, a token at most the longest one's text."""
        if num_parts > max_length or num_chars > max_length * self._longest_token:
            raise RequestError(
                f"{param}: longer than the {max_length} tokens taken here; shorten it",
                code="context_length_exceeded",
                param=param,
            )


def _render(
    rows: Tokeniser | None, tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> list[int]:
    if not tokenizer.chat_template:
        raise RequestError("messages: this base has no chat template; use /v1/completions", param="messages")
    try:
        if rows is not None:
            return rows.prompt_ids(messages, tools or None)
        ids = tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except (TemplateError, BadRow, RecursionError) as error:
        # Templates refuse in their own words, for example that roles must alternate.
        reason = str(error).encode("utf-8", "replace").decode()[:200]
        raise RequestError(f"messages: the chat template refuses them: {reason}", param="messages") from None
    return list(ids)
