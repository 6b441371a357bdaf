"""The engine on one GPU, without Ray, against transformers and PEFT: `python -m benchmarks.gpu.engine --json`.

Random weights in the shapes of Llama 3.2 1B and 3.1 8B. First answers of a mixed batch are held to PEFT's logits;
then both sides take turns over the base and under 1, 8 and 64 adapters, and tokens of prompts and answers together
per second are compared. The peer chooses its batch size.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve.arms import HuggingFace, Rate, interleave, measure, our_engine, our_requests, ours
from benchmarks.serve.setup import Setup
from ftray.engine.core import StepEngine

_REQUESTS = 64
_CHECKED = 8
_MARGIN = {"float32": 1e-2, "bfloat16": 0.5}
"""How far below the greatest logit a token may be: rounding over the layers of the largest shape."""


def check(
    engine: StepEngine, peer: HuggingFace, setup: Setup, names: Sequence[str], new_tokens: int
) -> dict[str, float]:
    """Hold answers of a mixed batch to PEFT's logits, each alone; raises `AssertionError` if one is not its own.

    Returns:
        `worst_logit_gap` under the adapters asked for, and under each one's neighbour: what the check would catch.
    """
    prompts = setup.prompts(_CHECKED, [*names])
    answers = [output.token_ids for output in engine.generate(our_requests(prompts, new_tokens))]
    pairs = list(zip(prompts, answers, strict=True))
    gaps = [peer.worst_gap(prompt.ids, answer, prompt.adapter) for prompt, answer in pairs]
    others = [names[(names.index(str(prompt.adapter)) + 1) % len(names)] for prompt, _ in pairs]
    wrong = [peer.worst_gap(p.ids, answer, other) for (p, answer), other in zip(pairs, others, strict=True)]
    found = {"worst_logit_gap": max(gaps), "worst_logit_gap_of_another_adapter": max(wrong)}
    assert max(gaps) <= _MARGIN[setup.dtype], found
    return found


def fastest(peer: HuggingFace, prompts: Sequence[Any], new_tokens: int, batches: Sequence[int]) -> Any:
    """The peer's work at the batch size with most tokens a second."""
    works = {size: peer.work(prompts, new_tokens, size) for size in batches}
    rates: dict[int, Rate] = {}
    for size, work in works.items():
        try:
            work()
            rates[size] = measure(work)
        except torch.OutOfMemoryError:
            continue
    return works[max(rates, key=lambda size: rates[size].per_s)]


def compare(setup: Setup, shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Correctness, then tokens per second."""
    adapters = setup.adapters(shape, max(options.adapters))
    names = list(adapters)
    base, new_tokens = setup.base(shape), options.new_tokens
    settings = {
        "device": setup.device,
        "max_num_seqs": _REQUESTS,
        "max_loras": len(names),
        "kv_cache_tokens": 32768,
    }
    engine = our_engine(base, adapters, setup.dtype, **settings)
    peer = HuggingFace(base, adapters, setup.dtype, setup.device)
    figures: dict[str, Any] = check(engine, peer, setup, names, min(16, new_tokens))
    plain = HuggingFace(base, {}, setup.dtype, setup.device)
    arms = {}
    for count in (0, *options.adapters):
        prompts = setup.prompts(_REQUESTS, [*names[:count]] or [None])
        arms[f"ours_{count}"] = ours(engine, prompts, new_tokens)
        arms[f"hf_{count}"] = fastest(peer if count else plain, prompts, new_tokens, options.batches)
    rates = interleave(arms, options.rounds)
    figures |= {
        f"tokens_per_s_{name}": statistics.median(r.per_s for r in found) for name, found in rates.items()
    }
    for count in (0, *options.adapters):
        both = list(zip(rates[f"ours_{count}"], rates[f"hf_{count}"], strict=True))
        figures[f"ratio_vs_hf_{count}"] = statistics.median(a.per_s / b.per_s for a, b in both)
    if setup.device == "cuda":
        figures["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def main() -> None:
    """Print the figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.engine", description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["1b", "8b"], choices=["1b", "8b", "tiny"])
    parser.add_argument("--adapters", nargs="*", type=int, default=[1, 8, 64])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--batches", nargs="*", type=int, default=[16, 32, 64], help="what the peer chooses from"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep bases and adapters here")
    parser.add_argument("--json", action="store_true", help="one JSON line only (it is always the last)")
    options = parser.parse_args()
    figures: dict[str, Any] = {
        "benchmark": "gpu engine",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "dtype": options.dtype,
        "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    with tempfile.TemporaryDirectory() as temporary:
        setup = Setup((options.folder or Path(temporary)).resolve(), options.dtype, options.device)
        setup.folder.mkdir(parents=True, exist_ok=True)
        for shape in options.shapes:
            found = compare(setup, shape, options)
            figures[shape] = {name: float(f"{value:.4g}") for name, value in found.items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
