"""What one request may take of the endpoint, and what all of them may: time, bytes, places in the queue."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from ftray.config.tenant import TenantConfig
from ftray.serve import http

from .conftest import ASK, CHAT, Serve, Server, chat_body
from .test_tenants import sha256


def test_a_huge_body_is_413(server: Server) -> None:
    assert server.post(CHAT, content=b" " * (9 * 2**20)).status_code == 413


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_what_it_held(serve: Serve, stream: bool) -> None:
    with serve(text="x" * 1000, step_s=0.02) as server:
        body = chat_body(stream=stream, max_tokens=1000)
        if stream:
            with httpx.stream("POST", server.url + CHAT, json=body) as response:
                lines = response.iter_lines()  # closes the response when it is collected
                next(lines)
                assert server.engine.stats().blocks_used > 0
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + CHAT, json=body, timeout=0.3)
        server.wait_idle()
        assert not server.loop._streams


def test_a_client_that_stops_reading_frees_what_it_held(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection stays, and nothing that is sent to it ever goes out."""
    monkeypatch.setattr(http, "_LAST_EVENT_S", 0.1)
    tenants = [TenantConfig(name="ann", key_sha256=sha256("key-ann"), max_concurrent_requests=1)]
    headers = {"authorization": "Bearer key-ann"}
    body = json.dumps(chat_body(stream=True, max_tokens=1000)).encode()

    async def asked(app: Any) -> None:
        scope = {
            "type": "http", "method": "POST", "path": CHAT, "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        incoming = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            return incoming.pop() if incoming else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async with asyncio.timeout(10):
            await app(scope, receive, send)

    with serve(tenants=tenants, text="x" * 5000, step_s=0.01, timeout_s=0.5) as server:
        asyncio.run(asked(server.app))
        server.wait_idle()
        assert not server.loop._streams and not server.front.in_flight
        response = server.post(CHAT, json=chat_body(max_tokens=1), headers=headers)  # its seat is free
        assert response.status_code == 200
        assert 'status="499"' in httpx.get(f"{server.url}/metrics", headers=headers).text


def test_overload_is_429_with_retry_after(serve: Serve) -> None:
    with serve(text="x" * 40, step_s=0.01, max_answers=3, max_num_seqs=1) as server:
        responses: list[httpx.Response] = []
        threads = [
            threading.Thread(
                target=lambda: responses.append(server.post(CHAT, json=chat_body(max_tokens=20)))
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [response for response in responses if response.status_code == 429]
        assert len(refused) == 5
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        assert sum(response.status_code == 200 for response in responses) == 3
        server.wait_idle()


def test_the_client_of_openai_knows_a_full_endpoint(serve: Serve) -> None:
    with serve(text="x" * 1000, step_s=0.02, max_answers=1) as server:
        stream = server.client().chat.completions.create(model="base", messages=ASK, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            server.client().chat.completions.create(model="base", messages=ASK)
        assert caught.value.code == "overloaded"
        stream.close()
        server.wait_idle()


def test_a_request_has_its_time(serve: Serve) -> None:
    with serve(text="x" * 1000, step_s=0.02, timeout_s=0.3) as server:
        assert server.post(CHAT, json=chat_body()).status_code == 504
        lines = server.post(CHAT, json=chat_body(stream=True)).text
        assert "event: error" in lines
        assert "[DONE]" not in lines
        server.wait_idle()


def test_a_body_that_does_not_come_has_its_time_too(serve: Serve) -> None:
    with serve(timeout_s=0.3) as server:

        def slow() -> Iterator[bytes]:
            yield b"{"
            time.sleep(1)
            yield b"}"

        start = time.monotonic()
        assert server.post(CHAT, content=slow()).status_code == 504
        assert time.monotonic() - start < 2


def test_a_tenant_has_only_so_many_bytes_here_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftray.serve.limits.MAX_TENANT_BODY_BYTES", 10_000)
    sent, answered = threading.Event(), threading.Event()
    body = json.dumps(chat_body(user="x" * 8_000)).encode()

    def held() -> Iterator[bytes]:
        yield body[:6_000]
        sent.set()
        answered.wait(10)
        yield body[6_000:]

    with serve() as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, CHAT, content=held())
        assert sent.wait(5)
        time.sleep(0.2)  # the first part is on its way
        refused = server.post(CHAT, content=body)
        answered.set()
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert first.result().status_code == 200
        assert server.post(CHAT, content=body).status_code == 200
