"""Quotas hold over all fronts together, say when to come again, and take back what was not used."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from ftray.config.tenant import TenantConfig
from ftray.core.errors import RequestError
from ftray.serve.quota import LEASE_S, SEAT_S, Gate, Quotas

from .conftest import CHAT, Serve, chat_body
from .test_tenants import sha256


def tenant(**quota: int) -> TenantConfig:
    return TenantConfig(name="ann", key_sha256=sha256("key-ann"), **quota)


class Fronts:
    """Several gates over one count, with a clock of their own."""

    def __init__(self, config: TenantConfig, number: int = 1) -> None:
        self.now = 0.0
        self.config = config
        self.quotas = Quotas(clock=lambda: self.now)
        self.quotas.set_tenants([config])
        self.gates = [Gate(self.quotas, f"f{n}", clock=lambda: self.now) for n in range(number)]

    async def admitted(self, tokens: int = 0) -> int:
        """How many requests get in, turn by turn, until every front refuses."""
        count, refused = 0, 0
        while refused < len(self.gates):
            for gate in self.gates:
                try:
                    admission = await gate.enter(self.config)
                    await admission.reserve(tokens)
                    count, refused = count + 1, 0
                except RequestError as error:
                    assert error.status == 429
                    assert 1 <= error.retry_after_s <= 60
                    refused += 1
        return count


@pytest.mark.parametrize("fronts", [1, 3])
def test_requests_in_a_minute(fronts: int) -> None:
    limit = 60
    count = asyncio.run(Fronts(tenant(requests_per_minute=limit), fronts).admitted())
    assert limit - 3 * fronts < count <= limit  # what another front has leased is not ours


@pytest.mark.parametrize("fronts", [1, 3])
def test_tokens_in_a_minute(fronts: int) -> None:
    count = asyncio.run(Fronts(tenant(tokens_per_minute=1000), fronts).admitted(tokens=10))
    assert 100 - 5 * fronts < count <= 100


def test_what_was_reserved_long_ago_is_not_given_back() -> None:
    async def scenario() -> None:
        fronts = Fronts(tenant(tokens_per_minute=100))
        gate = fronts.gates[0]
        admission = await gate.enter(fronts.config)
        await admission.reserve(60)
        fronts.now += LEASE_S + 1
        later = await gate.enter(fronts.config)
        await later.reserve(10)  # a lease of now, into which nothing of then may come
        admission.close(0)
        with pytest.raises(RequestError):
            await later.reserve(60)

    asyncio.run(scenario())


def test_who_leaves_before_the_first_token_pays_for_the_prompt(serve: Serve) -> None:
    headers = {"authorization": "Bearer key-ann"}
    long = [{"role": "user", "content": "x" * 40}]
    with serve(tenants=[tenant(tokens_per_minute=60)], step_s=0.6) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.post(CHAT, json=chat_body(messages=long, max_tokens=5), headers=headers, timeout=0.3)
        server.wait_idle()
        while server.front.in_flight:
            time.sleep(0.01)
        again = server.post(CHAT, json=chat_body(messages=long, max_tokens=5), headers=headers)
    assert again.status_code == 429


def test_what_an_answer_did_not_use_is_given_back() -> None:
    async def scenario() -> None:
        fronts = Fronts(tenant(tokens_per_minute=100))
        for _ in range(10):  # each may take 100, and takes 10
            admission = await fronts.gates[0].enter(fronts.config)
            await admission.reserve(100)
            admission.close(10)
            with pytest.raises(RequestError):
                other = await fronts.gates[0].enter(fronts.config)
                await other.reserve(100)
                raise AssertionError
            break
        admission = await fronts.gates[0].enter(fronts.config)
        await admission.reserve(90)

    asyncio.run(scenario())


def test_more_than_a_minute_has_is_no_matter_of_waiting() -> None:
    async def scenario() -> None:
        fronts = Fronts(tenant(tokens_per_minute=100))
        admission = await fronts.gates[0].enter(fronts.config)
        with pytest.raises(RequestError, match="quota is 100") as caught:
            await admission.reserve(101)
        assert caught.value.status == 400

    asyncio.run(scenario())


def test_places_hold_over_all_fronts_and_are_given_back() -> None:
    async def scenario() -> None:
        fronts = Fronts(tenant(max_concurrent_requests=3), 2)
        first, second = fronts.gates
        inside = [await first.enter(fronts.config) for _ in range(3)]
        with pytest.raises(RequestError, match="at once"):
            await second.enter(fronts.config)
        inside.pop().close(0)
        with pytest.raises(RequestError):
            await second.enter(fronts.config)  # the first front has yet to give the place back
        await first.renew()
        taken = await second.enter(fronts.config)
        with pytest.raises(RequestError):
            await second.enter(fronts.config)
        taken.close(0)
        taken.close(0)  # once only
        await second.renew()
        assert await fronts.admitted() == 1

    asyncio.run(scenario())


def test_places_of_a_front_that_died_come_back() -> None:
    async def scenario() -> None:
        fronts = Fronts(tenant(max_concurrent_requests=1), 2)
        await fronts.gates[0].enter(fronts.config)
        with pytest.raises(RequestError):
            await fronts.gates[1].enter(fronts.config)
        fronts.now += SEAT_S + 1
        await fronts.gates[1].enter(fronts.config)

    asyncio.run(scenario())


def test_nothing_is_kept_of_tenants_that_have_gone() -> None:
    async def scenario() -> None:
        fronts = Fronts(tenant(tokens_per_minute=100, max_concurrent_requests=2))
        (gate,) = fronts.gates
        admission = await gate.enter(fronts.config)
        await admission.reserve(40)
        fronts.now += LEASE_S + 1
        await gate.renew()
        assert not gate._purses and fronts.quotas._seats
        admission.close(10)  # its lease is over: nothing comes back
        await gate.renew()
        fronts.quotas.set_tenants([])
        assert not gate._inside and not gate._granted and not fronts.quotas._seats

    asyncio.run(scenario())


def test_over_http(serve: Serve) -> None:
    headers = {"authorization": "Bearer key-ann"}

    def ask(server: Any, **fields: Any) -> httpx.Response:
        response: httpx.Response = server.post(CHAT, json=chat_body(**fields), headers=headers)
        return response

    with serve(tenants=[tenant(requests_per_minute=3)]) as server:
        answers = [ask(server) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert int(answers[-1].headers["retry-after"]) >= 1
    with serve(tenants=[tenant(tokens_per_minute=60)]) as server:
        assert ask(server, max_tokens=50).status_code == 200  # 6 of the prompt, and 16 that were answered
        assert ask(server, max_tokens=30).status_code == 200
        assert ask(server, max_tokens=30).status_code == 429
        assert ask(server, max_tokens=100).status_code == 400
        server.wait_idle()
    with serve(tenants=[tenant(max_concurrent_requests=1)], text="x" * 500, step_s=0.01) as server:
        with httpx.stream(
            "POST", server.url + CHAT, json=chat_body(stream=True), headers=headers
        ) as response:
            lines = response.iter_lines()
            next(lines)
            assert ask(server, max_tokens=1).json()["error"]["code"] == "too_many_concurrent_requests"
        server.wait_idle()
        assert ask(server, max_tokens=1).status_code == 200
