"""Prompts become tokens off the event loop, the short ones without waiting for the long ones."""

import asyncio
import threading
import time
from typing import Any

import pytest

from ftray.core.errors import RequestError
from ftray.engine.fake import ByteTokenizer
from ftray.serve.messages import Message
from ftray.serve.prompts import Prompts
from ftray.serve.schema import ChatBody, CompletionBody


class Watched(ByteTokenizer):
    """Takes a while over long texts, and notes who asks."""

    threads: list[threading.Thread]

    def __init__(self) -> None:
        self.threads = []

    def __deepcopy__(self, memo: Any) -> "Watched":
        other = Watched()
        other.threads = self.threads
        return other

    def encode(self, text: str, **_: Any) -> list[int]:
        self.threads.append(threading.current_thread())
        if len(text) > 20_000:
            time.sleep(0.5)
        return super().encode(text)


async def tokens(prompts: Prompts, body: Any, limit: int) -> list[int]:
    if isinstance(body, ChatBody):
        return await prompts.chat(body, limit)
    (ids,) = await prompts.completions(body, limit)
    return ids


def text(length: int) -> CompletionBody:
    return CompletionBody(model="base", prompt="x" * length)


def chat(number: int) -> ChatBody:
    return ChatBody(model="base", messages=[Message(role="user", content="")] * number)


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    async def scenario() -> None:
        prompts = Prompts(Watched())
        long = asyncio.create_task(tokens(prompts, text(50_000), 50_000))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        for _ in range(3):
            assert await tokens(prompts, text(3), 50_000) == [120] * 3
        assert time.monotonic() - start < 0.2
        assert not long.done()
        assert len(await long) == 50_000

    asyncio.run(scenario())


@pytest.mark.parametrize("body", [text(10), text(30_000), chat(1), chat(30_000)])
def test_nothing_is_tokenised_on_the_event_loop(body: Any) -> None:
    tokenizer = Watched()
    asyncio.run(tokens(Prompts(tokenizer), body, 50_000))
    assert tokenizer.threads and threading.main_thread() not in tokenizer.threads


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (text(101), "prompt"),
        (chat(101), "messages"),
        (CompletionBody(model="base", prompt=[7] * 101), "prompt"),
        (ChatBody(model="base", messages=[Message(role="user", content="x" * 101)]), "messages"),
    ],
)
def test_what_cannot_fit_is_refused_before_any_work(body: Any, param: str) -> None:
    tokenizer = Watched()
    with pytest.raises(RequestError) as caught:
        asyncio.run(tokens(Prompts(tokenizer), body, 100))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)
    assert not tokenizer.threads


def test_a_long_token_may_stand_for_many_characters() -> None:
    class Merging(ByteTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return super().get_vocab() | {"x" * 8: 300}

        def encode(self, text: str, **_: Any) -> list[int]:
            return [300] * (len(text) // 8)

    prompts = Prompts(Merging())
    assert len(asyncio.run(tokens(prompts, text(800), 100))) == 100
    with pytest.raises(RequestError):
        asyncio.run(tokens(prompts, text(801), 100))
