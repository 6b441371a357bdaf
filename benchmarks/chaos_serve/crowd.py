"""Crowds: more requests than can be answered, one tenant's flood, hundreds that leave."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from benchmarks.chaos_serve.clients import CHAT, HANG_S, MODELS, Asked, judge_stream
from benchmarks.chaos_serve.endpoint import NUM_ENGINES, PLACES, Endpoint
from benchmarks.chaos_serve.versions import LONG, QUESTIONS

LEVELS = (1, 2, 5, 10)
_LEVEL_S = 6.0
_FLOOD = 32
_VICTIM_REQUESTS = 30
_LEAVERS = 300


class Crowd:
    """Asks an endpoint from one event loop, as fast or as often as is wanted.

    Args:
        endpoint: who is asked.
        seed: decides who asks what.
    """

    def __init__(self, endpoint: Endpoint, seed: int) -> None:
        self._endpoint, self._judge = endpoint, endpoint.judge
        self._draw = random.Random(seed)

    def overload(self) -> dict[str, Any]:
        """Ask at multiples of what the endpoint answers at best; returns answers per second at each."""
        return asyncio.run(self._within(self._overload))

    def flood(self) -> dict[str, Any]:
        """Time a tenant's first tokens beside one other request and beside a flood of them."""
        return asyncio.run(self._within(self._flood))

    def leave(self) -> dict[str, Any]:
        """Hundreds of clients begin to be answered, or not even that, and leave."""
        asyncio.run(self._within(self._leave))
        self._endpoint.wait_free()
        return {}

    async def _within(self, play: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        async with httpx.AsyncClient(base_url=self._endpoint.url, timeout=HANG_S, limits=limits) as client:
            try:
                return await play(client)
            finally:
                self._judge.quiet()

    async def _overload(self, client: httpx.AsyncClient) -> dict[str, Any]:
        best = await self._saturated(client)
        found = {"best": round(best, 1)}
        for times in LEVELS:
            found[f"{times}x"] = round(await self._offered(client, best * times), 1)
        return {"goodput_per_s": found}

    async def _saturated(self, client: httpx.AsyncClient) -> float:
        """Answers per second with every row of the engines taken and nobody refused."""
        until = time.monotonic() + _LEVEL_S

        async def go_on(tenant: str) -> int:
            answered = 0
            while time.monotonic() < until:
                answered += await self._ask(client, self._any(tenant)) == 200
            return answered

        began = time.monotonic()
        tenants = list(MODELS) * (NUM_ENGINES * PLACES // len(MODELS))
        answered = sum(await asyncio.gather(*map(go_on, tenants)))
        return answered / (time.monotonic() - began)

    async def _offered(self, client: httpx.AsyncClient, rate_per_s: float) -> float:
        """Ask at a rate whatever comes back; returns answers per second."""
        began, tasks = time.monotonic(), []
        for number in range(int(rate_per_s * _LEVEL_S)):
            await asyncio.sleep(max(0.0, began + number / rate_per_s - time.monotonic()))
            tasks.append(asyncio.create_task(self._ask(client, self._any())))
        statuses = Counter(await asyncio.gather(*tasks))
        return statuses[200] / (time.monotonic() - began)

    async def _flood(self, client: httpx.AsyncClient) -> dict[str, Any]:
        fair = await self._victim(client, 1)
        flooded = await self._victim(client, _FLOOD)
        return {"victim_p95_s": [round(_p95(times), 3) for times in (fair, flooded)]}

    async def _victim(self, client: httpx.AsyncClient, num_others: int) -> list[float]:
        """Seconds to the first token of one request after the other, beside others' that never cease."""

        async def go_on() -> None:
            while True:
                if await self._ask(client, Asked("eve", "c", 0, LONG)) != 200:
                    await asyncio.sleep(0.2)

        others = [asyncio.create_task(go_on()) for _ in range(num_others)]
        await asyncio.sleep(1.0)
        times: list[float] = []
        for _ in range(_VICTIM_REQUESTS):
            await self._streamed(
                client, Asked("bob", "b", self._draw.randrange(len(QUESTIONS)), stream=True), times
            )
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return times

    async def _leave(self, client: httpx.AsyncClient) -> None:
        places = asyncio.Semaphore(NUM_ENGINES * PLACES)

        async def begin_and_leave(asked: Asked, num_parts: int) -> None:
            async with places:
                self._judge.count("requests")
                async with client.stream(
                    "POST", CHAT, json=asked.body(), headers=self._key(asked)
                ) as response:
                    parts = response.aiter_text()
                    for _ in range(num_parts):
                        await anext(parts, None)
                self._judge.count("left_early")

        async def lose_patience(asked: Asked, after_s: float) -> None:
            try:
                async with asyncio.timeout(after_s):
                    await begin_and_leave(asked, 10_000)
            except TimeoutError:
                self._judge.count("left_early")

        tasks: list[Awaitable[None]] = []
        for number in range(_LEAVERS):
            asked = self._any(stream=True)
            if number % 2:
                tasks.append(begin_and_leave(asked, self._draw.randrange(40)))
            else:
                tasks.append(lose_patience(asked, self._draw.uniform(0.0, 0.5)))
        for problem in await asyncio.gather(*tasks, return_exceptions=True):
            if problem is not None:
                self._judge.count("failed", f"while others leave: {type(problem).__name__}: {problem}")

    def _any(self, tenant: str | None = None, *, stream: bool = False) -> Asked:
        tenant = tenant or self._draw.choice(list(MODELS))
        model, question = self._draw.choice(MODELS[tenant]), self._draw.randrange(len(QUESTIONS))
        return Asked(tenant, model, question, LONG, stream)

    def _key(self, asked: Asked) -> dict[str, str]:
        return {"authorization": f"Bearer {self._endpoint.keys[asked.tenant]}"}

    async def _ask(self, client: httpx.AsyncClient, asked: Asked) -> int:
        """One request that may be refused; returns its status, 0 if there was none."""
        self._judge.count("requests")
        try:
            response = await client.post(CHAT, json=asked.body(), headers=self._key(asked))
        except httpx.TimeoutException:
            self._judge.count("hangs")
            return 0
        except httpx.HTTPError as error:
            self._judge.count("failed", f"{type(error).__name__}: {error}")
            return 0
        if response.status_code == 200:
            text = response.json()["choices"][0]["message"]["content"]
            self._judge.answer(
                asked.model, asked.question, asked.num_tokens, response.headers["x-ftray-digest"], text
            )
        elif response.status_code not in (429, 503):
            self._judge.count("other_statuses", f"{response.status_code} {response.text[:100]}")
        elif not response.headers.get("retry-after", "").isdigit():
            self._judge.count("without_retry_after", str(dict(response.headers)))
        else:
            self._judge.count("refused")
        return response.status_code

    async def _streamed(self, client: httpx.AsyncClient, asked: Asked, times: list[float]) -> None:
        """One stream that must be answered; its time to the first token is appended."""
        self._judge.count("requests")
        began, parts = time.monotonic(), list[str]()
        async with client.stream("POST", CHAT, json=asked.body(), headers=self._key(asked)) as response:
            if response.status_code != 200:
                self._judge.count("failed", f"beside a flood: {response.status_code}")
                return
            async for part in response.aiter_text():
                if not parts:
                    times.append(time.monotonic() - began)
                parts.append(part)
        judge_stream(self._judge, asked, response.headers["x-ftray-digest"], "".join(parts))


def _p95(times: list[float]) -> float:
    return sorted(times)[int(0.95 * (len(times) - 1))] if times else float("inf")
