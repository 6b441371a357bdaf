"""An HTTP endpoint in this process, on a real socket, over an engine without a model."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from ftray.config.serve import TenantConfig
from ftray.engine.fake import FakeEngineConfig
from ftray.serve.backend import ServedModel
from ftray.serve.http import create_app
from ftray.serve.loop import EngineLoop
from ftray.serve.prompts import Prompts
from ftray.serve.tenants import Access

MODELS = [
    ServedModel(id="base", ref="tiny", digest="xxh3:base"),
    ServedModel(id="alpha", ref="alpha@3", digest="xxh3:aaaa", folder="/deltas/alpha"),
    ServedModel(id="beta@1", ref="beta@1", digest="xxh3:bbbb", folder="/deltas/beta"),
]

ASK: list[Any] = [{"role": "user", "content": "hello"}]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


def chat_body(**fields: Any) -> dict[str, Any]:
    """A chat request that is answered, with changes."""
    return {"model": "base", "messages": ASK, "temperature": 0} | fields


@dataclass
class Server:
    """A running endpoint."""

    url: str
    engine: Any
    loop: EngineLoop

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path: str, **settings: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=30, **settings)

    def wait_idle(self, within_s: float = 2.0) -> None:
        """Wait until nothing runs and no block is held."""
        until = time.monotonic() + within_s
        while self.engine.has_work() or self.engine.stats().blocks_used:
            assert time.monotonic() < until, self.engine.stats()
            time.sleep(0.01)


Serve = Callable[..., contextlib.AbstractContextManager[Server]]


@contextlib.contextmanager
def serving(
    tenants: list[TenantConfig] | None = None,
    max_requests: int = 32,
    timeout_s: float = 20.0,
    engine: Any = None,
    metrics_key_sha256: str | None = None,
    **settings: Any,
) -> Iterator[Server]:
    """Start an endpoint for the length of a block."""
    config = FakeEngineConfig(**settings)
    engine = engine or config.build("tiny")
    for model in MODELS:
        if model.folder:
            engine.load_delta(model.digest, model.folder)
    loop = EngineLoop(engine, max_requests).start()
    access = Access(tenants or [], MODELS, metrics_key_sha256)
    prompts = Prompts(config.load_tokenizer("tiny"))
    app = create_app(MODELS, prompts, loop, access, request_timeout_s=timeout_s)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, loop)
        finally:
            server.should_exit = True
            thread.join(10)
            loop.stop()


@pytest.fixture(scope="session")
def serve() -> Serve:
    """`with serve(...) as server:` starts an endpoint with settings of its own."""
    return serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """An endpoint with the usual settings."""
    with serving(text="Hi 🙂 from {model}. END") as server:
        yield server
