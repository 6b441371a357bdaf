"""A client that leaves, at whatever moment: everything its request held is free again within a second."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from .conftest import CHAT, COMPLETE, Serve, Server, chat_body

STEP_S = 0.02
NUM_TOKENS = 30


@pytest.fixture
def slow(serve: Serve) -> Iterator[Server]:
    """One row, so that a second request waits."""
    with serve(text="x" * NUM_TOKENS, step_s=STEP_S, max_num_seqs=1, max_answers=8) as server:
        yield server


def leave(server: Server, after_s: float, path: str = CHAT, **body: Any) -> None:
    """Ask and close the connection after a time in which no answer comes."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + path, json=body, timeout=httpx.Timeout(10, read=after_s))


def check_free(server: Server, delta: str) -> None:
    """Nothing waits, runs, holds blocks or refers to the delta a second from now at most."""
    until = time.monotonic() + 1.0
    server.wait_idle(within_s=1.0)
    while server.loop._streams or server.front.in_flight or server.engine.delta_info(delta).in_flight:
        assert time.monotonic() < until, (server.loop._streams, server.front.in_flight)
        time.sleep(0.01)
    server.wait_idle(within_s=0)


@pytest.mark.parametrize("stream", [True, False])
def test_in_the_queue(slow: Server, stream: bool) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.post, CHAT, json=chat_body())
        while not slow.engine.stats().running:
            time.sleep(0.005)
        leave(slow, 0.2, **chat_body(model="alpha", stream=stream))
        gone = time.monotonic()
        while slow.engine.stats().waiting:
            assert time.monotonic() - gone < 1.0
            time.sleep(0.01)
        assert slow.engine.stats().running == 1  # the other one goes on
        assert first.result().status_code == 200
    check_free(slow, "xxh3:aaaa")


@pytest.mark.parametrize("stream", [True, False])
def test_in_prefill(slow: Server, stream: bool) -> None:
    leave(slow, 0.1, COMPLETE, model="alpha", prompt="x" * 3500, max_tokens=100, stream=stream)
    check_free(slow, "xxh3:aaaa")


@pytest.mark.parametrize("seen", [1, NUM_TOKENS - 1, NUM_TOKENS])
def test_in_decode_and_at_the_last_step(slow: Server, seen: int) -> None:
    body = chat_body(model="alpha", stream=True)
    with httpx.stream("POST", slow.url + CHAT, json=body, timeout=20) as response:
        texts = 0
        lines = response.iter_lines()  # closes the response when it is collected
        for line in lines:
            texts += '"content":"x' in line
            if texts >= seen:
                break
    check_free(slow, "xxh3:aaaa")


def test_of_several_answers_at_once(serve: Serve) -> None:
    with serve(text="x" * 400, step_s=STEP_S, max_num_seqs=3, max_answers=32) as server:
        body = {"model": "alpha", "prompt": ["a", "b"], "n": 3, "max_tokens": 300, "stream": True}
        with httpx.stream("POST", server.url + COMPLETE, json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
        check_free(server, "xxh3:aaaa")


def test_many_leave_at_random(serve: Serve) -> None:
    with serve(text="x" * 60, step_s=0.005, max_num_seqs=4, max_answers=64) as server:

        def ask(number: int) -> None:
            body = chat_body(model=("base", "alpha", "beta@1")[number % 3], stream=number % 2 == 0)
            timeout = httpx.Timeout(10, read=0.02 + 0.01 * (number % 7))
            with contextlib.suppress(httpx.ReadTimeout):
                httpx.post(server.url + CHAT, json=body, timeout=timeout)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check_free(server, "xxh3:aaaa")
        assert server.post(CHAT, json=chat_body()).status_code == 200
