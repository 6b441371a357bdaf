"""A whole endpoint in this process: control, engines, front and admin API as they are, without Ray between them."""

import asyncio
import contextlib
import dataclasses
import shutil
import socket
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import uvicorn

from ftray.config.serve import ServeConfig
from ftray.core.spec import spec
from ftray.delta import manifest
from ftray.engine.core import StepEngine
from ftray.engine.fake import FakeDelta, FakeEngineConfig
from ftray.registry.registry import Registry
from ftray.serve.admin import AdminServer, create_admin_app
from ftray.serve.affinity import preferred
from ftray.serve.backend import ServedModel
from ftray.serve.control import Control
from ftray.serve.follow import FrontFollower, repeat
from ftray.serve.front import Front, View
from ftray.serve.http import create_app
from ftray.serve.models import Follower
from ftray.serve.prompts import Prompts
from ftray.serve.quota import Gate
from ftray.serve.ray_ingress import RayBackend
from ftray.serve.ray_replica import EngineReplica
from ftray.serve.ray_router import _asked
from ftray.serve.usage import UsageLog

from .conftest import ASK

ADMIN = "admin-token"
BASE = ServedModel(id="base", ref="tiny", digest="xxh3:base", is_base=True)
FOLLOW_S = 0.05


@spec
class PoisonedEngineConfig(FakeEngineConfig):
    """Answers with the version's number; a version whose folder has a file named `nan` gives no numbers."""

    def build(self, base: str) -> StepEngine:
        """The engine."""
        engine = super().build(base)
        runner: Any = engine._runner
        forward = runner.forward
        names: dict[str, str] = {}

        def reading(folder: str) -> Any:
            _, number, *note = (Path(folder) / "README.md").read_text().split()
            found = FakeDelta(manifest.read(folder, verify=False).digest)
            names[found.digest] = f"nan-{number}" if note else number
            return found

        def loading(key: str, delta: FakeDelta) -> None:
            runner._names[key] = names[delta.digest]

        def stepping(rows: Any, keys: Any, keep: Any) -> torch.Tensor:
            logits = forward(rows, keys, keep)
            samplers = [key for row, key in zip(rows, keys, strict=True) if row.samples]
            for at, key in enumerate(samplers):
                if key is not None and runner._names[key].startswith("nan"):
                    logits[at] = float("nan")
            return logits

        runner.read, runner.load, runner.forward = reading, loading, stepping
        engine.info = dataclasses.replace(engine.info, base_digest=BASE.digest)
        return engine


class Versions:
    """Publishes versions that differ by a line in their README."""

    def __init__(self, adapter: Path, root: Path) -> None:
        self.registry = Registry(root / "registry")
        self._adapter, self._root, self._count = adapter, root, 0

    def publish(self, name: str, note: str = "") -> str:
        """The next version of a name; returns `name@version`."""
        self._count += 1
        folder = Path(shutil.copytree(self._adapter, self._root / f"delta-{self._count}"))
        (folder / "README.md").write_text(f"number {self._count} {note}\n")
        identity = {"digest": "xxh3:" + "0" * 32, "model_type": "llama", "name": "tiny"}
        manifest.write(folder, kind="low_rank", base=identity)
        return self.registry.publish(folder, name).ref


class LocalHandle:
    """As much of a deployment handle as is used, over objects of this process; a dead one raises."""

    def __init__(self, *members: Any) -> None:
        self.members = list(members)
        self.queues: defaultdict[int, int] = defaultdict(int)

    def options(self, **_: Any) -> "LocalHandle":
        return self

    def __getattr__(self, method: str) -> "LocalMethod":
        return LocalMethod(self, method)

    def pick(self, *arguments: Any) -> Any:
        """By affinity, as the router does."""
        queues: dict[str, int | None] = {str(at): self.queues[at] for at in range(len(self.members))}
        delta, attempt = _asked(arguments)
        return int(preferred(delta, queues, attempt)[0][0])


class LocalMethod:
    """One method of whichever member is picked."""

    def __init__(self, handle: LocalHandle, name: str) -> None:
        self.handle, self.name = handle, name

    def remote(self, *arguments: Any) -> Any:
        at = self.handle.pick(*arguments)
        result = getattr(self.handle.members[at], self.name)(*arguments)
        return Items(result, self.handle, at) if self.name == "generate" else result


class Items:
    """The items of a streaming call."""

    def __init__(self, items: AsyncGenerator[Any, None], handle: LocalHandle, at: int) -> None:
        self._items, self._handle, self._at = items, handle, at

    async def __aiter__(self) -> AsyncIterator[Any]:
        self._handle.queues[self._at] += 1
        try:
            async for item in self._items:
                yield item
        finally:
            self._handle.queues[self._at] -= 1
            await self._items.aclose()

    def cancel(self) -> None:
        pass


class Local:
    """A running endpoint."""

    def __init__(self, url: str, admin_url: str, control: Control, engines: list[Any], front: Front) -> None:
        self.url, self.admin_url = url, admin_url
        self.control, self.engines, self.front = control, engines, front

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def ask(self, model: str, **fields: Any) -> tuple[str, str]:
        """The text and the digest of an answer."""
        raw = self.client().chat.completions.with_raw_response.create(
            model=model, messages=ASK, temperature=0, **fields
        )
        return raw.parse().choices[0].message.content or "", raw.headers["x-ftray-digest"]

    def admin(self, method: str, path: str, *, token: str = ADMIN, **settings: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"}
        return httpx.request(method, f"{self.admin_url}{path}", headers=headers, timeout=10, **settings)

    def wait(self, condition: Callable[[], bool], within_s: float = 5.0) -> None:
        """Wait until something is so."""
        until = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < until, self.control.status()
            time.sleep(0.01)

    def loaded(self) -> list[list[str]]:
        """What each engine knows."""
        return [engine._loop._engine.deltas() for engine in self.engines]


@contextlib.contextmanager
def local_endpoint(
    versions: Versions, config: dict[str, Any], *, num_engines: int = 2, **engine: Any
) -> Iterator[Local]:
    """Start an endpoint for the length of a block."""
    settings = PoisonedEngineConfig(**{"text": "I am {model}."} | engine)
    fields = {"base": "tiny", "registry": str(versions.registry.root), "follow_s": FOLLOW_S} | config
    serve_config = ServeConfig(**fields, engine=settings)
    started: asyncio.Queue[Local] = asyncio.Queue()
    ready, stop = threading.Event(), threading.Event()
    made: list[Local] = []

    async def main() -> None:
        made.append(await _start(serve_config, versions, num_engines, stopping := []))
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.01)
        for end in reversed(stopping):
            await end()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(20), started
    local = made[0]
    try:
        local.wait(lambda: not local.control.rollout.pending() and bool(local.front.view.models))
        yield local
    finally:
        stop.set()
        thread.join(20)


async def _start(
    config: ServeConfig,
    versions: Versions,
    num_engines: int,
    stopping: list[Callable[[], Coroutine[Any, Any, None]]],
) -> Local:
    control = Control(config, BASE, Follower(versions.registry, lambda folder: None).models)
    await control.look()
    link: Any = control_link(control)
    tasks = [asyncio.create_task(control.run())]
    engines = []
    cls: Any = EngineReplica.func_or_class  # type: ignore[attr-defined]
    for _ in range(num_engines):
        engines.append(engine := cls.__new__(cls))
        await engine.__init__(config, LocalHandle(link))
        tasks.append(engine._following)
    front = Front(View(models=[]), keys=config.asks_for_keys)
    gate = Gate(link, front.name)
    prompts = Prompts(config.engine.load_tokenizer("tiny"))
    backend: Any = RayBackend(LocalHandle(*engines))  # type: ignore[arg-type]
    app = create_app(front, prompts, backend, gate, UsageLog(config.usage_folder, front.name))
    tasks.append(asyncio.create_task(repeat(FrontFollower(front, gate, link).follow, config.follow_s)))
    assert config.admin_token_sha256 is not None
    admin = AdminServer(create_admin_app(control, config.admin_token_sha256), 0)
    await admin.start()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.005)

    async def end() -> None:
        server.should_exit = True
        await serving
        await admin.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in engines:
            await asyncio.to_thread(engine._loop.stop)

    stopping.append(end)
    url, admin_url = (f"http://127.0.0.1:{port}" for port in (listener.getsockname()[1], admin.port))
    return Local(url, admin_url, control, engines, front)


def control_link(control: Control) -> Any:
    """The control as members reach it: `sync` is a coroutine there."""

    class Link:
        async def sync(self, report: Any) -> Any:
            return control.sync(report)

        lease, seats = staticmethod(control.lease), staticmethod(control.seats)

    return Link()
