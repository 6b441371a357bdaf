"""The same work through Ray Serve and HTTP, and what a flood does to somebody else's requests."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence

import httpx
import torch

from benchmarks.measure import cpu_seconds
from benchmarks.serve.arms import measure, our_engine, ours
from benchmarks.serve.sections import Figures, Section, percentile
from benchmarks.serve.setup import Prompt
from ftray.config.serve import ServeConfig
from ftray.core.spec import parse

_STREAMS = 16
_ROWS = 16
_FLOOD = 32
_VICTIM_REQUESTS = 20


@contextlib.contextmanager
def _endpoint(section: Section, shape: str, tenants: int, max_num_seqs: int) -> Iterator[str]:
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
        },
    }
    with session(num_cpus=2):
        handle = run(parse(ServeConfig, settings))
        try:
            yield handle.url
        finally:
            handle.stop()


async def _ask(client: httpx.AsyncClient, key: str, prompt: Prompt, new_tokens: int) -> list[float]:
    """Times at which a streamed answer's parts came, after the time of asking."""
    body = {
        "model": "base",
        "prompt": prompt.ids,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times, tokens = [time.perf_counter()], 0
    headers = {"Authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            else:
                times.append(time.perf_counter())
    assert tokens == new_tokens, tokens
    return times


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None))


def http(section: Section, shape: str) -> Figures:
    """16 streams through the endpoint against the engine alone, which takes turns with it.

    Processor time of the endpoint is that of Ray and all its workers, without this process, which is the client.
    """
    new_tokens = section.new_tokens[shape]
    prompts = section.setup.prompts(_STREAMS, [None])
    tokens = sum(len(prompt.ids) + new_tokens for prompt in prompts)
    engine = our_engine(section.setup.base(shape), {}, section.setup.dtype, max_num_seqs=_ROWS)
    alone = ours(engine, prompts, new_tokens)
    efficiency, gaps, firsts, steps = [], [], [], []

    async def through(url: str) -> list[list[float]]:
        async with _client(url) as client:
            return await asyncio.gather(*(_ask(client, "t0", prompt, new_tokens) for prompt in prompts))

    with _endpoint(section, shape, 1, _ROWS) as url:
        for number in range(section.rounds + 1):
            before = cpu_seconds() - time.process_time()
            found = asyncio.run(through(url))
            cpu_s = cpu_seconds() - time.process_time() - before
            rate = measure(alone)
            if number:
                efficiency.append(tokens / cpu_s / rate.per_cpu_s)
                firsts += [times[1] - times[0] for times in found]
                gaps += [b - a for times in found for a, b in itertools.pairwise(times[1:])]
                steps.append(tokens / rate.per_s / new_tokens)
    return {
        "http_efficiency": statistics.median(efficiency),
        "http_ttft_ms_p50": 1e3 * statistics.median(firsts),
        "http_inter_token_ms_p50": 1e3 * statistics.median(gaps),
        "http_inter_token_ms_p95": 1e3 * percentile(gaps, 95),
        "http_inter_token_p95_over_p50": percentile(gaps, 95) / statistics.median(gaps),
        "engine_alone_ms_per_new_token": 1e3 * statistics.median(steps),
    }


def victim(section: Section, shape: str) -> Figures:
    """One stream of one tenant beside 15 others' single streams, then beside 32 streams of one other tenant.

    Both fill the 16 rows of the engine; the ratio is of the 95th percentiles of its requests' durations.
    """
    new_tokens = section.new_tokens[shape] // 2
    prompts = section.setup.prompts(_FLOOD, [None])

    async def load(client: httpx.AsyncClient, keys: Sequence[str]) -> list[float]:
        stop = asyncio.Event()

        async def go_on(key: str, prompt: Prompt) -> None:
            while not stop.is_set():
                await _ask(client, key, prompt, new_tokens)

        others = [asyncio.create_task(go_on(k, p)) for k, p in zip(keys, prompts, strict=False)]
        times = []
        for number in range(_VICTIM_REQUESTS):
            start = time.perf_counter()
            await _ask(client, "t0", prompts[number % len(prompts)], new_tokens)
            times.append(time.perf_counter() - start)
        stop.set()
        await asyncio.gather(*others)
        return times[2:]

    async def both(url: str) -> tuple[list[float], list[float]]:
        async with _client(url) as client:
            fair = await load(client, [f"t{number}" for number in range(1, _ROWS)])
            return fair, await load(client, ["t1"] * _FLOOD)

    with _endpoint(section, shape, _ROWS, _ROWS) as url:
        fair, flooded = asyncio.run(both(url))
    return {
        "victim_p95_ratio": percentile(flooded, 95) / percentile(fair, 95),
        "victim_p50_ratio": statistics.median(flooded) / statistics.median(fair),
        "victim_fair_ms_p95": 1e3 * percentile(fair, 95),
    }
