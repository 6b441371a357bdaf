"""What passes between the HTTP front and a replica: whose mistake it was, and what is tried again."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from ftray.config.serve import ServeConfig
from ftray.core.errors import RequestError
from ftray.engine.api import Output, Request, Sampling
from ftray.engine.fake import FakeEngineConfig
from ftray.serve.backend import Unavailable
from ftray.serve.control import Orders
from ftray.serve.ray_ingress import RayBackend
from ftray.serve.ray_replica import EngineReplica, Gone, Refused

ASK = Request(id="r", prompt_ids=[65], sampling=Sampling(max_tokens=5))
OUTPUT = Output(id="r", text="x", token_ids=[120])
LAST = Output(id="r", text="", token_ids=[121], finish_reason="stop")


class Control:
    """As much of the control's handle as a replica uses; it orders nothing."""

    @property
    def sync(self) -> "Control":
        return self

    async def remote(self, report: Any) -> Orders:
        return Orders(hold=[], view=None)


async def replica() -> Any:
    config = ServeConfig(base="tiny", engine=FakeEngineConfig())
    cls: Any = EngineReplica.func_or_class  # type: ignore[attr-defined]
    made = cls.__new__(cls)
    await made.__init__(config, Control())
    return made


def test_a_mistake_of_ours_is_said_in_band_without_its_words() -> None:
    async def scenario() -> list[Any]:
        made = await replica()
        made._loop._engine.add = _raising
        return [item async for item in made.generate(ASK)]

    (item,) = asyncio.run(scenario())
    assert isinstance(item, Refused)
    assert item.status == 500
    assert "secret" not in item.message


def test_a_delta_that_is_not_here_is_left_to_another_replica() -> None:
    async def scenario() -> list[Any]:
        made = await replica()
        return [item async for item in made.generate(dataclasses.replace(ASK, delta="xxh3:unknown"))]

    (item,) = asyncio.run(scenario())
    assert isinstance(item, Gone)


def _raising(*_: Any) -> None:
    raise KeyError("secret prompt")


class Handle:
    """As much of a deployment handle as is used: each call plays the next of the given scripts."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.calls = 0

    def options(self, **_: Any) -> "Handle":
        return self

    @property
    def generate(self) -> "Handle":
        return self

    def remote(self, *_: Any) -> "Items":
        self.calls += 1
        return Items(self.scripts.pop(0))


class Items:
    """The items of one call; an exception among them is raised."""

    def __init__(self, script: list[Any]) -> None:
        self.script = script

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.script:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        pass


BUG = RayTaskError("generate", "trace", ValueError("planted")).as_instanceof_cause()
WRONG = Refused("no", 400, "invalid_request", None)


@pytest.mark.parametrize(
    ("scripts", "expected", "calls"),
    [
        ([[ActorDiedError()], [OUTPUT, LAST]], [OUTPUT, LAST], 2),
        ([[Gone()], [OUTPUT, LAST]], [OUTPUT, LAST], 2),
        ([[ActorDiedError()], *[[Gone()]] * 5], Unavailable, 6),
        ([[OUTPUT, ActorDiedError()]], Unavailable, 1),
        ([[BUG]], ValueError, 1),
        ([[WRONG]], RequestError, 1),
    ],
)
def test_only_a_death_before_the_first_token_is_tried_again(
    scripts: list[Any], expected: Any, calls: int
) -> None:
    handle = Handle(*scripts)

    async def collect() -> list[Output]:
        return [output async for output in RayBackend(handle).generate(ASK)]  # type: ignore[arg-type]

    if isinstance(expected, list):
        assert asyncio.run(collect()) == expected
    else:
        with pytest.raises(expected):
            asyncio.run(collect())
    assert handle.calls == calls
