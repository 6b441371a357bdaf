"""An HTTP endpoint in this process, on a real socket, over an engine without a model."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from ftray.config.serve import TenantConfig
from ftray.engine.fake import FakeDelta, FakeEngineConfig
from ftray.serve.backend import ServedModel
from ftray.serve.front import Front, View
from ftray.serve.http import create_app
from ftray.serve.loop import EngineLoop
from ftray.serve.prompts import Prompts
from ftray.serve.quota import Gate, Quotas
from ftray.serve.usage import UsageLog

MODELS = [
    ServedModel(id="base", ref="tiny", digest="xxh3:base", is_base=True),
    ServedModel(id="alpha", ref="alpha@3", digest="xxh3:aaaa"),
    ServedModel(id="beta@1", ref="beta@1", digest="xxh3:bbbb"),
]

ASK: list[Any] = [{"role": "user", "content": "hello"}]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


_CLIENT = httpx.Client(timeout=30, verify=False)  # one for all: reading certificates takes long


def chat_body(**fields: Any) -> dict[str, Any]:
    """A chat request that is answered, with changes."""
    return {"model": "base", "messages": ASK, "temperature": 0} | fields


@dataclass
class Server:
    """A running endpoint."""

    url: str
    engine: Any
    loop: EngineLoop
    front: Front
    app: Any

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path: str, **settings: Any) -> httpx.Response:
        return _CLIENT.post(self.url + path, **settings)

    def wait_idle(self, within_s: float = 2.0) -> None:
        """Wait until nothing runs and no block is held."""
        until = time.monotonic() + within_s
        while self.engine.has_work() or self.engine.stats().blocks_used:
            assert time.monotonic() < until, self.engine.stats()
            time.sleep(0.01)


Serve = Callable[..., contextlib.AbstractContextManager[Server]]


def knows_digests(engine: Any, models: list[ServedModel]) -> None:
    """Give what an engine without files reads the digests that are served, beside the names it spells."""
    names = {model.digest: model.name for model in models}
    digests = {name: digest for digest, name in names.items()}
    runner, base = engine._runner, next(model for model in models if model.is_base)
    engine.info = dataclasses.replace(engine.info, base_digest=base.digest)
    runner.read = lambda folder: FakeDelta(digests[Path(folder).name])
    runner.load = lambda key, delta: runner._names.update({key: names[delta.digest]})


@contextlib.contextmanager
def serving(
    tenants: list[TenantConfig] | None = None,
    max_answers: int = 32,
    timeout_s: float = 20.0,
    engine: Any = None,
    tokenizer: Any = None,
    metrics_key_sha256: str | None = None,
    usage_folder: str | None = None,
    models: list[ServedModel] = MODELS,
    **settings: Any,
) -> Iterator[Server]:
    """Start an endpoint for the length of a block."""
    config = FakeEngineConfig(**settings)
    engine = engine or config.build("tiny")
    knows_digests(engine, models)
    for model in models:
        if model.delta:
            engine.load_delta(model.delta, f"/deltas/{model.name}")
    loop = EngineLoop(engine, max_answers).start()
    front = Front(View(models=models, tenants=tenants or []), metrics_key_sha256=metrics_key_sha256)
    quotas = Quotas()
    quotas.set_tenants(tenants or [])
    prompts = Prompts(tokenizer or engine.tokenizer)
    usage = UsageLog(usage_folder, "front")
    app = create_app(front, prompts, loop, Gate(quotas, "front"), usage, request_timeout_s=timeout_s)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, loop, front, app)
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
