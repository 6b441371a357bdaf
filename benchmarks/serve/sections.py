"""What is measured, part by part; each returns figures by name."""

import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve.arms import HuggingFace, Rate, Work, interleave, measure, our_engine, our_requests, ours
from benchmarks.serve.setup import SHAPES, Prompt, Setup, linear_shapes
from ftray.engine.core import StepEngine

Figures = dict[str, Any]
_REQUESTS = 32
_STREAMS = (1, 8, 32)
_REGISTERED = 1000
_DISTINCT = 64
_KEPT_OF_DISK = 16
"""Adapters in memory beside those in place, where the others are to be read from disk."""


class Section:
    """Settings that parts share.

    Args:
        setup: prompts, bases and adapters.
        rounds: how often every arm runs.
        new_tokens: of each answer, by shape.
        batches: batch sizes the peer may choose from.
    """

    def __init__(self, setup: Setup, rounds: int, new_tokens: dict[str, int], batches: Sequence[int]) -> None:
        self.setup, self.rounds, self.new_tokens, self.batches = setup, rounds, new_tokens, batches

    def engine(self, shape: str, adapters: int, **settings: Any) -> StepEngine:
        """Our engine with so many adapters in place."""
        found = self.setup.adapters(shape, adapters)
        return our_engine(self.setup.base(shape), found, self.setup.dtype, **settings)


def throughput(section: Section, shape: str) -> Figures:
    """32 requests at once: ours over the base and under 8 and 32 adapters, and both of the peer's ways."""
    setup, new_tokens = section.setup, section.new_tokens[shape]
    names = list(setup.adapters(shape, _REQUESTS))
    prompts = {
        "base": setup.prompts(_REQUESTS, [None]),
        "8": setup.prompts(_REQUESTS, [*names[:8]]),
        "32": setup.prompts(_REQUESTS, [*names]),
    }
    engine = section.engine(shape, _REQUESTS)
    arms: dict[str, Work] = {name: ours(engine, mine, new_tokens) for name, mine in prompts.items()}
    figures: Figures = {"requests": _REQUESTS, "new_tokens": new_tokens}
    figures["prompt_tokens"] = sum(len(prompt.ids) for prompt in prompts["base"])
    for name, which in (("hf_base", "base"), ("hf_peft_8", "8")):
        adapters = setup.adapters(shape, 8) if which == "8" else {}
        peer = HuggingFace(setup.base(shape), adapters, setup.dtype)
        figures[f"{name}_batch"], arms[name] = peer.fastest(prompts[which], new_tokens, section.batches)
    rates = interleave(arms, section.rounds)
    return figures | _ratios(rates) | _adapter_cost(rates)


def _ratios(rates: dict[str, list[Rate]]) -> Figures:
    figures: Figures = {}
    pairs = {
        "ratio_vs_hf_peft_8": ("8", "hf_peft_8"),
        "ratio_vs_hf_base": ("base", "hf_base"),
        "ratio_8_vs_base": ("8", "base"),
        "ratio_32_vs_base": ("32", "base"),
    }
    for figure, (left, right) in pairs.items():
        both = list(zip(rates[left], rates[right], strict=True))
        figures[figure] = statistics.median(a.per_cpu_s / b.per_cpu_s for a, b in both)
        figures[f"{figure}_wall"] = statistics.median(a.per_s / b.per_s for a, b in both)
    for name, found in rates.items():
        figures[f"tokens_per_cpu_s_{name}"] = statistics.median(rate.per_cpu_s for rate in found)
    return figures


def _adapter_cost(rates: dict[str, list[Rate]]) -> Figures:
    return {
        f"adapter_us_per_token_{count}": 1e6
        * statistics.median(
            1 / a.per_cpu_s - 1 / b.per_cpu_s for a, b in zip(rates[count], rates["base"], strict=True)
        )
        for count in ("8", "32")
    }


def latency(section: Section, shape: str) -> Figures:
    """Time to the first token and between tokens, of 1, 8 and 32 streams under as many adapters."""
    engine = section.engine(shape, max(_STREAMS))
    names = list(section.setup.adapters(shape, max(_STREAMS)))
    figures: Figures = {}
    for streams in _STREAMS:
        firsts: list[float] = []
        gaps: list[float] = []
        steps: list[float] = []
        for part in range(max(1, 8 // streams)):
            prompts = section.setup.prompts(streams * (part + 1), [*names])[-streams:]
            _stream(engine, prompts, section.new_tokens[shape], firsts, gaps, steps)
        for name, times in (("ttft", firsts), ("inter_token", gaps)):
            figures |= {f"{name}_ms_p{p}_{streams}": 1e3 * percentile(times, p) for p in (50, 95)}
        figures[f"inter_token_p95_over_step_{streams}"] = percentile(gaps, 95) / statistics.median(steps)
    return figures


def _stream(
    engine: StepEngine,
    prompts: list[Prompt],
    new_tokens: int,
    firsts: list[float],
    gaps: list[float],
    steps: list[float],
) -> None:
    last: dict[str, float] = {}
    start = time.perf_counter()
    for request in our_requests(prompts, new_tokens):
        engine.add(request)
    before = start
    while engine.has_work():
        outputs = engine.step()
        now = time.perf_counter()
        steps.append(now - before)
        before = now
        for output in outputs:
            (gaps if output.id in last else firsts).append(now - last.get(output.id, start))
            last[output.id] = now


def percentile(times: Sequence[float], percent: int) -> float:
    """The time that so many in a hundred do not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def bandwidth(section: Section, shape: str) -> Figures:
    """Bytes of weights that decoding one stream reads a second, of those that a sum over memory reads."""
    engine, new_tokens = section.engine(shape, 0), 4 * section.new_tokens[shape]
    (prompt,) = section.setup.prompts(1, [None])
    prompt = Prompt(prompt.ids[:16], None)
    config = SHAPES[shape]
    elements = sum(rows * columns for rows, columns in linear_shapes(shape).values())
    elements += config["vocab_size"] * config["hidden_size"]
    size_bytes = elements * (2 if section.setup.dtype == "bfloat16" else 4)
    block = torch.ones(1 << 28)
    fractions, found = [], []
    for _ in range(section.rounds + 1):
        start = time.process_time()
        block.sum()
        memory = block.nbytes / (time.process_time() - start)
        rate = measure(ours(engine, [prompt], new_tokens)).per_cpu_s * new_tokens / (new_tokens + 16)
        fractions.append(rate * size_bytes / memory)
        found.append((rate, memory))
    rate, memory = found[-1]
    return {
        "decode_fraction_of_bandwidth": statistics.median(fractions[1:]),
        "decode_tokens_per_cpu_s_1": rate,
        "memory_read_gb_per_cpu_s": memory / 1e9,
    }


def swaps(section: Section, shape: str) -> Figures:
    """Milliseconds to put an adapter in place: from memory, and from disk (its pages cached)."""
    engine = section.engine(shape, 4)
    runner: Any = engine._runner
    folder = str(section.setup.adapters(shape, 1)["a0"])
    reads, puts = [], []
    for number in range(11):
        start = time.perf_counter()
        delta = runner.read(folder)
        middle = time.perf_counter()
        runner.load(f"swap{number}", delta)
        reads.append(middle - start)
        puts.append(time.perf_counter() - middle)
        runner.unload(f"swap{number}")
    host, read = statistics.median(puts[1:]), statistics.median(reads[1:])
    return {"swap_in_ms_host": 1e3 * host, "swap_in_ms_disk": 1e3 * (host + read)}


def registered(section: Section, shape: str) -> Figures:
    """Requests under 1,000 registered adapters in Zipf's proportions, 32 of them in place, against the base.

    Twice: those not in place are kept in memory, or 16 are and the others are read from disk (`_disk`).
    """
    setup, requests, new_tokens = section.setup, 4 * _REQUESTS, section.new_tokens[shape]
    folders = dict(_copies(setup, shape))
    draw = random.Random(0)
    weights = [1 / (rank + 1) for rank in range(_REGISTERED)]
    names = draw.choices([f"r{number}" for number in range(_REGISTERED)], weights, k=requests)
    prompts = setup.prompts(requests, [*names])
    plain = [Prompt(prompt.ids, None) for prompt in prompts]
    engines = {
        name: section.engine(shape, 0, max_loras=32, max_num_seqs=32, max_cpu_loras=kept)
        for name, kept in (("", 256), ("_disk", _KEPT_OF_DISK))
    }
    for engine in engines.values():
        for name, folder in folders.items():
            engine.register_delta(name, str(folder))
    arms = {f"registered{name}": ours(engine, prompts, new_tokens) for name, engine in engines.items()}
    rates = interleave(arms | {"base": ours(engines[""], plain, new_tokens)}, section.rounds)
    figures: Figures = {"registered_distinct_used": len(set(names))}
    for name, engine in engines.items():
        both = list(zip(rates[f"registered{name}"], rates["base"], strict=True))
        figures |= {
            f"registered{name}_loads": engine.stats().delta_loads / (section.rounds + 1),
            f"registered{name}_reads": engine.stats().delta_reads / (section.rounds + 1),
            f"ratio_1000_registered{name}": statistics.median(a.per_cpu_s / b.per_cpu_s for a, b in both),
            f"ratio_1000_registered{name}_wall": statistics.median(a.per_s / b.per_s for a, b in both),
            f"tokens_per_cpu_s_registered{name}": statistics.median(a.per_cpu_s for a, _ in both),
        }
    return figures


def _copies(setup: Setup, shape: str) -> Iterator[tuple[str, Path]]:
    """1,000 adapter folders: hard links to the files of 64."""
    sources = itertools.cycle(setup.adapters(shape, _DISTINCT).values())
    for number, source in zip(range(_REGISTERED), sources, strict=False):
        folder = setup.folder / f"registered-{shape}-{setup.dtype}" / f"r{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if not (folder / file.name).exists():
                os.link(file, folder / file.name)
        yield f"r{number}", folder


SECTIONS: dict[str, Callable[[Section, str], Figures]] = {
    "throughput": throughput,
    "latency": latency,
    "bandwidth": bandwidth,
    "swaps": swaps,
    "registered": registered,
}
