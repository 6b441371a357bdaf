"""The thread that owns the engine outlives whatever its callers do, and leaves nobody waiting when it ends."""

import asyncio
import contextlib
import dataclasses
import threading
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ftray.core.errors import RequestError
from ftray.engine.api import Output, Request, Sampling
from ftray.engine.core import StepEngine
from ftray.engine.fake import FakeEngineConfig
from ftray.serve.backend import Unavailable
from ftray.serve.loop import EngineLoop


def request() -> Request:
    return Request(id=uuid.uuid4().hex, prompt_ids=[65], sampling=Sampling(max_tokens=100))


def engine(step_s: float = 0.0) -> StepEngine:
    return FakeEngineConfig(text="x" * 20, step_s=step_s).build("tiny")


@contextlib.asynccontextmanager
async def running(engine: Any) -> AsyncIterator[EngineLoop]:
    loop = EngineLoop(engine, max_answers=8).start()
    try:
        yield loop
    finally:
        await asyncio.to_thread(loop.stop)


async def collect(loop: EngineLoop) -> list[Output]:
    async with asyncio.timeout(5):
        return [output async for output in loop.generate(request())]


def test_a_cancelled_call_leaves_the_thread_alive() -> None:
    async def scenario() -> None:
        async with running(engine(step_s=0.05)) as loop:
            answer = asyncio.create_task(collect(loop))
            await asyncio.sleep(0.02)
            waiting = asyncio.create_task(loop.stats())
            await asyncio.sleep(0)  # the command is posted while a step runs
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            outputs = await answer
            assert outputs[-1].finish_reason == "stop"
            assert loop.healthy
            assert (await loop.stats()).running == 0

    asyncio.run(scenario())


def test_a_command_that_fails_disturbs_nobody() -> None:
    async def scenario() -> None:
        broken = engine()
        broken.cancel = _raising  # type: ignore[method-assign]
        async with running(broken) as loop:
            for _ in range(2):
                assert (await collect(loop))[-1].finish_reason == "stop"
            assert loop.healthy

    asyncio.run(scenario())


def test_a_thread_that_dies_ends_its_streams() -> None:
    async def scenario() -> None:
        broken = engine(step_s=0.01)
        async with running(broken) as loop:
            outputs = loop.generate(request())
            await anext(outputs)
            broken.has_work = _raising  # type: ignore[method-assign]
            async with asyncio.timeout(5):
                with pytest.raises(Unavailable):
                    async for _ in outputs:
                        pass
            assert not loop.healthy

    asyncio.run(scenario())


def test_what_is_asked_around_a_stop_is_answered() -> None:
    async def scenario() -> None:
        async with running(engine(step_s=0.1)) as loop:
            answer = asyncio.create_task(collect(loop))
            await asyncio.sleep(0.05)  # in a step
            before = asyncio.create_task(loop.call(lambda engine: engine.deltas()))
            await asyncio.sleep(0)
            stopping = asyncio.create_task(asyncio.to_thread(loop.stop))
            while not loop._stopping:
                await asyncio.sleep(0)
            async with asyncio.timeout(5):
                with pytest.raises(Unavailable):  # posted after the stop, while the thread still steps
                    await loop.call(lambda engine: engine.deltas())
                with pytest.raises(Unavailable):
                    await collect(loop)
                assert await before == []
                with pytest.raises(Unavailable):
                    await answer
            await stopping

    asyncio.run(scenario())


def test_a_slow_reader_gets_fewer_and_larger_pieces() -> None:
    async def scenario() -> None:
        async with running(engine()) as loop:
            outputs = loop.generate(request())
            first = await anext(outputs)
            await asyncio.sleep(0.5)  # the engine is long done
            rest = [output async for output in outputs]
            assert len(rest) <= 2
            assert first.text + "".join(output.text for output in rest) == "x" * 20
            assert sum(len(output.token_ids) for output in [first, *rest]) == 21
            assert rest[-1].finish_reason == "stop"

    asyncio.run(scenario())


def test_a_step_that_hangs_is_found() -> None:
    async def scenario() -> None:
        hanging = engine()
        go_on = threading.Event()
        forward = hanging._runner.forward
        hanging._runner.forward = lambda *given: (go_on.wait(10), forward(*given))[1]  # type: ignore[method-assign]
        loop = EngineLoop(hanging, max_answers=8, max_step_s=1.5).start()
        try:
            answer = asyncio.create_task(collect(loop))
            async with asyncio.timeout(5):
                await asyncio.sleep(0.1)
                await loop.stats()  # waits for no step
                assert loop.healthy
                while loop.healthy:
                    await asyncio.sleep(0.05)
                with pytest.raises(Unavailable):
                    await loop.stats()
            go_on.set()
            assert (await answer)[-1].finish_reason == "stop"
            assert loop.healthy
        finally:
            go_on.set()
            await asyncio.to_thread(loop.stop)

    asyncio.run(scenario())


def asked_by(tenant: str, weight: float = 1.0, n: int = 1) -> Request:
    return Request(
        id=uuid.uuid4().hex,
        prompt_ids=[65],
        sampling=Sampling(max_tokens=100, n=n),
        tenant=tenant,
        weight=weight,
    )


async def ended(loop: EngineLoop, asked: Request) -> str:
    """Why an answer ended, or the status of its refusal."""
    try:
        return [output async for output in loop.generate(asked)][-1].finish_reason or ""
    except RequestError as error:
        return str(error.status)


def test_who_floods_makes_room_for_the_others() -> None:
    """Two places in the engine and six beside it."""

    async def scenario() -> None:
        busy = FakeEngineConfig(text="x" * 20, step_s=0.01, max_num_seqs=2).build("tiny")
        async with running(busy) as loop:
            flood = [asyncio.create_task(ended(loop, asked_by("ann"))) for _ in range(8)]
            await asyncio.sleep(0.05)  # two have begun
            victims = [asyncio.create_task(ended(loop, asked_by("bob"))) for _ in range(4)]
            light = [asyncio.create_task(ended(loop, asked_by("cat", weight=0.1))) for _ in range(2)]
            assert await asyncio.gather(*victims) == ["stop"] * 4
            assert await asyncio.gather(*light) == ["stop", "429"]  # a second is more than its weight allows
            assert await asyncio.gather(*flood) == ["stop"] * 4 + ["429"] * 4  # the latest
            assert not loop._streams
            assert not busy.has_work()

    asyncio.run(scenario())


def test_what_has_begun_and_what_is_fair_is_never_given_up() -> None:
    async def scenario() -> None:
        async with running(engine(step_s=0.01)) as loop:
            begun = loop.generate(asked_by("ann", n=8))
            await anext(begun)
            newcomer = loop.generate(asked_by("bob"))
            await anext(newcomer)  # who holds nothing is not locked out by what has begun
            for name, n in [("bob", 1), ("cat", 2), ("ann", 1)]:
                with pytest.raises(RequestError) as refused:
                    await anext(loop.generate(asked_by(name, n=n)))
                assert refused.value.status == 429
            assert [output async for output in begun][-1].finish_reason == "stop"
            await newcomer.aclose()
            mine = [asyncio.create_task(anext(loop.generate(asked_by(name)))) for name in "aaaabbbb"]
            await asyncio.sleep(0)
            for name in "ab":
                with pytest.raises(RequestError):
                    await anext(loop.generate(asked_by(name)))
            third = asyncio.create_task(anext(loop.generate(asked_by("c"))))
            results = await asyncio.gather(*mine, third, return_exceptions=True)
            assert [isinstance(result, RequestError) for result in results].count(True) == 1
            assert not isinstance(results[-1], RequestError)

    asyncio.run(scenario())


def test_prompts_of_one_request_begin_and_are_given_up_together() -> None:
    """Two rows: of a request of four prompts that has begun two wait, and so do two of the next one."""

    async def scenario() -> None:
        busy = FakeEngineConfig(text="x" * 20, step_s=0.01, max_num_seqs=2).build("tiny")
        async with running(busy) as loop:
            ann = [dataclasses.replace(asked_by("ann"), group=name) for name in ["first"] * 4 + ["next"] * 4]
            answers = [asyncio.create_task(ended(loop, one)) for one in ann]
            await asyncio.sleep(0.05)  # two have begun
            bob = asyncio.create_task(ended(loop, asked_by("bob")))
            assert await asyncio.gather(*answers) == ["stop"] * 4 + ["429"] * 4
            assert await bob == "stop"

    asyncio.run(scenario())


def test_more_answers_than_there_are_places_is_the_clients_mistake() -> None:
    async def scenario() -> None:
        async with running(engine()) as loop:
            with pytest.raises(RequestError, match="n: 9 answers at once; ask for at most 8") as refused:
                await anext(loop.generate(asked_by("ann", n=9)))
            assert refused.value.status == 400
            assert [output async for output in loop.generate(asked_by("ann", n=8))]

    asyncio.run(scenario())


def _raising(*_: Any) -> Any:
    raise KeyError("planted")
