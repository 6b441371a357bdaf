"""An endpoint on Ray Serve, a client that costs little, and whose processor time is whose."""

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

from benchmarks.serve.sections import Section
from benchmarks.serve.setup import Prompt
from ftray.config.serve import ServeConfig
from ftray.core.spec import parse

_PARTS = {"engine": ":engine", "front": ":http", "proxy": "ProxyActor"}


@contextlib.contextmanager
def endpoint(section: Section, shape: str, tenants: int, max_num_seqs: int, **engine: Any) -> Iterator[str]:
    """URL of an endpoint over the base, with so many tenants, whose keys are their names."""
    from ftray.cluster.ray_session import session
    from ftray.serve.ray_app import run

    names = [f"t{number}" for number in range(tenants)]
    settings = {
        "base": str(section.setup.base(shape)),
        "registry": str(section.setup.folder / "registry"),
        "port": 0,
        "tenants": [{"name": n, "key_sha256": hashlib.sha256(n.encode()).hexdigest()} for n in names],
        "engine": {
            "type": "torch",
            "dtype": section.setup.dtype,
            "device": "cpu",
            "num_threads": torch.get_num_threads(),
            "kv_cache_tokens": 16384,
            "max_num_seqs": max_num_seqs,
            "prefix_cache": False,
        }
        | engine,
    }
    with session(num_cpus=2):
        handle = run(parse(ServeConfig, settings))
        try:
            yield handle.url
        finally:
            handle.stop()


async def ask(url: str, key: str, prompt: Prompt, new_tokens: int) -> list[float]:
    """Times at which a streamed answer's parts came, after the time of asking.

    Bare sockets: a client library takes as much time for an event as the server does, on the cores they share.
    """
    body = json.dumps(
        {
            "model": "base",
            "prompt": prompt.ids,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    place = urlsplit(url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    times, last = [time.perf_counter()], b""
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        assert b" 200 " in status, status
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                last = line
                times.append(time.perf_counter())
    finally:
        writer.close()
    tokens = json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]
    assert tokens == new_tokens, tokens
    return times[:-1]  # the last event counts tokens


def cpu_by_part() -> dict[str, float]:
    """Processor seconds so far of the engine, the front, Ray's proxy, the rest of Ray, and this process."""
    found = dict.fromkeys((*_PARTS, "ray"), 0.0) | {"client": time.process_time()}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name, times = " ".join(process.cmdline()), process.cpu_times()
            part = next((part for part, mark in _PARTS.items() if mark in name), "ray")
            found[part] += times.user + times.system + times.children_user + times.children_system
    return found
