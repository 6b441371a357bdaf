"""The same work through Ray Serve and HTTP, and what a flood does to somebody else's requests."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence

from benchmarks.serve.arms import measure, our_engine, our_requests, ours
from benchmarks.serve.endpoint import ask, cpu_by_part, endpoint
from benchmarks.serve.sections import Figures, Section, percentile
from benchmarks.serve.setup import Prompt
from ftray.engine.core import StepEngine

_STREAMS = 16
_ROWS = 16
_NEW_TOKENS = 64
"""Of each answer: with fewer, the slowest twentieth of all gaps is those in which prompts are computed."""
_FLOOD = 32
_VICTIM_PARTS = 4
_VICTIM_REQUESTS = 12


def http(section: Section, shape: str) -> Figures:
    """16 streams through the endpoint against the engine alone, which takes turns with it.

    Processor time of the endpoint is that of Ray and all its workers, without this process, which is the client.
    Gaps are set against the engine's own steps of 16 single tokens, in the same turns.
    """
    prompts = section.setup.prompts(_STREAMS, [None])
    tokens = sum(len(prompt.ids) + _NEW_TOKENS for prompt in prompts)
    engine = our_engine(section.setup.base(shape), {}, section.setup.dtype, max_num_seqs=_ROWS)
    alone = ours(engine, prompts, _NEW_TOKENS)
    efficiency, costs, firsts, gaps, steps = [], [], [], [], []

    async def through(url: str) -> list[list[float]]:
        return await asyncio.gather(*(ask(url, "t0", prompt, _NEW_TOKENS) for prompt in prompts))

    with endpoint(section, shape, 1, _ROWS) as url:
        for number in range(section.rounds + 1):
            before, start = cpu_by_part(), time.perf_counter()
            found = asyncio.run(through(url))
            wall_s = time.perf_counter() - start
            cost = {part: cpu_s - before.get(part, 0.0) for part, cpu_s in cpu_by_part().items()}
            rate = measure(alone)
            if number:
                served_s = sum(cpu_s for part, cpu_s in cost.items() if part != "client")
                efficiency.append(tokens / served_s / rate.per_cpu_s)
                costs.append(cost | {"client_of_wall": cost["client"] / wall_s})
                firsts += [times[1] - times[0] for times in found]
                gaps += _gaps(found)
                steps += decode_steps(engine, prompts, _NEW_TOKENS)
    step_s = statistics.median(steps)
    new = _STREAMS * _NEW_TOKENS
    return {
        "http_efficiency": statistics.median(efficiency),
        "http_ttft_ms_p50": 1e3 * statistics.median(firsts),
        "http_inter_token_ms_p50": 1e3 * statistics.median(gaps),
        "http_inter_token_ms_p95": 1e3 * percentile(gaps, 95),
        "http_inter_token_p95_vs_step": percentile(gaps, 95) / step_s,
        "http_events_per_token": (len(gaps) + len(firsts)) / (new * section.rounds),
        "engine_step_ms_p50": 1e3 * step_s,
        "engine_step_ms_p95": 1e3 * percentile(steps, 95),
        "http_client_cpu_of_wall": statistics.median(cost.pop("client_of_wall") for cost in costs),
        "http_cpu_ms_per_new_token": {
            part: round(1e3 * statistics.median(cost[part] for cost in costs) / new, 3) for part in costs[0]
        },
    }


def _gaps(answers: Sequence[Sequence[float]]) -> list[float]:
    return [b - a for times in answers for a, b in itertools.pairwise(times[1:])]


def decode_steps(engine: StepEngine, prompts: Sequence[Prompt], new_tokens: int) -> list[float]:
    """Seconds of the engine's steps in which every row has one token."""
    for request in our_requests(prompts, new_tokens):
        engine.add(request)
    found, before = [], 0
    while engine.has_work():
        start = time.perf_counter()
        due = len(engine.step())
        if due == before == len(prompts):
            found.append(time.perf_counter() - start)
        before = due
    return found


def steady(section: Section, shape: str) -> Figures:
    """16 streams that ask again as soon as they have their answer, of 32 to 96 tokens: prompts beside answers."""
    asked = 1 + 2 * section.rounds
    prompts = section.setup.prompts(_STREAMS * asked, [None])
    engine = our_engine(section.setup.base(shape), {}, section.setup.dtype, max_num_seqs=_ROWS)

    async def stream(url: str, number: int) -> list[list[float]]:
        found = []
        for turn in range(asked):
            at = number * asked + turn
            found.append(await ask(url, "t0", prompts[at], 32 + at * 37 % 65))
        return found[1:]

    async def all_streams(url: str) -> list[list[float]]:
        found = await asyncio.gather(*(stream(url, number) for number in range(_STREAMS)))
        return list(itertools.chain.from_iterable(found))

    with endpoint(section, shape, 1, _ROWS) as url:
        found = asyncio.run(all_streams(url))
    step_s = statistics.median(decode_steps(engine, prompts[:_STREAMS], _NEW_TOKENS))
    gaps, firsts = _gaps(found), [times[1] - times[0] for times in found]
    return {
        "http_steady_ttft_ms_p50": 1e3 * statistics.median(firsts),
        "http_steady_inter_token_ms_p50": 1e3 * statistics.median(gaps),
        "http_steady_inter_token_ms_p95": 1e3 * percentile(gaps, 95),
        "http_steady_inter_token_p95_vs_step": percentile(gaps, 95) / step_s,
    }


def victim(section: Section, shape: str) -> Figures:
    """One stream of one tenant beside 15 others' single streams and beside 32 streams of one tenant, in turns.

    Both fill the 16 rows of the engine; the ratio is of the 95th percentiles of its requests' durations.
    """
    prompts = section.setup.prompts(_FLOOD, [None])
    new_tokens = _NEW_TOKENS // 2

    async def load(url: str, keys: Sequence[str]) -> list[float]:
        stop = asyncio.Event()

        async def go_on(key: str, number: int) -> None:
            while not stop.is_set():
                await ask(url, key, prompts[number], new_tokens)

        others = [asyncio.create_task(go_on(key, number)) for number, key in enumerate(keys)]
        times = []
        for number in range(_VICTIM_REQUESTS + 1):
            start = time.perf_counter()
            await ask(url, "t0", prompts[number % len(prompts)], new_tokens)
            times.append(time.perf_counter() - start)
        stop.set()
        await asyncio.gather(*others)
        return times[1:]

    with endpoint(section, shape, _ROWS, _ROWS) as url:
        fair: list[float] = []
        flooded: list[float] = []
        for _ in range(_VICTIM_PARTS):
            fair += asyncio.run(load(url, [f"t{number}" for number in range(1, _ROWS)]))
            flooded += asyncio.run(load(url, ["t1"] * _FLOOD))
    return {
        "victim_requests": len(flooded),
        "victim_p95_ratio": percentile(flooded, 95) / percentile(fair, 95),
        "victim_p50_ratio": statistics.median(flooded) / statistics.median(fair),
        "victim_fair_ms_p95": 1e3 * percentile(fair, 95),
    }
