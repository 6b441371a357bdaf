"""More requests than the engine can answer: it answers as many as ever, and tells the others when to come."""

import asyncio
import time
from collections import Counter

import httpx
import pytest

from .conftest import CHAT, Serve, Server, chat_body

ROWS, STEP_S, TOKENS = 4, 0.02, 12
CAPACITY_PER_S = ROWS / (STEP_S * TOKENS)


async def offered(server: Server, times: float, seconds: float) -> tuple[float, Counter[int], list[str]]:
    """Ask at a rate, whatever comes back; returns answers per second, statuses, and every Retry-After."""
    statuses: Counter[int] = Counter()
    waits: list[str] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(timeout=20, limits=limits) as client:

        async def ask() -> None:
            response = await client.post(server.url + CHAT, json=chat_body(max_tokens=TOKENS))
            statuses[response.status_code] += 1
            if response.status_code != 200:
                waits.append(response.headers.get("retry-after", ""))

        started = time.monotonic()
        tasks = []
        for number in range(int(CAPACITY_PER_S * times * seconds)):
            await asyncio.sleep(max(0.0, started + number / (CAPACITY_PER_S * times) - time.monotonic()))
            tasks.append(asyncio.create_task(ask()))
        await asyncio.gather(*tasks)
        taken = time.monotonic() - started
    return statuses[200] / taken, statuses, waits


def check(serve: Serve, levels: list[float], seconds: float) -> None:
    settings = {"text": "x" * 50, "step_s": STEP_S, "max_num_seqs": ROWS, "max_answers": 2 * ROWS}
    with serve(**settings) as server:
        found = {times: asyncio.run(offered(server, times, seconds)) for times in levels}
        server.wait_idle()
    goodputs = {times: goodput for times, (goodput, _, _) in found.items()}
    for times, (goodput, statuses, waits) in found.items():
        if times > 1:  # below that, less is asked for
            assert goodput >= 0.9 * max(goodputs.values()), goodputs
        assert set(statuses) <= {200, 429, 503}, statuses
        assert all(wait.isdigit() and int(wait) >= 1 for wait in waits)
        assert times < 2 or statuses[429] > 0


def test_overload(serve: Serve) -> None:
    check(serve, [0.8, 5], 1.5)


@pytest.mark.slow
def test_overload_at_every_level(serve: Serve) -> None:
    check(serve, [1, 2, 5, 10], 6)
