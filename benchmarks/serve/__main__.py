"""Serving speed: `python -m benchmarks.serve --json`.

Arms take turns in one process with one type of weights; a ratio is the median over the rounds, of tokens of prompts
and answers together per second of processor time (`_wall`: of the clock). The peer is `generate` of transformers,
with PEFT's mixed batches for adapters, at the fastest of several batch sizes and with prompts sorted by length. The
part `vllm` needs `FTRAY_VLLM_PYTHON`.
"""

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve.modelled import pace
from benchmarks.serve.over_http import http, steady, victim
from benchmarks.serve.sections import SECTIONS, Section
from benchmarks.serve.setup import SHAPES, Setup
from benchmarks.serve.versus_vllm import vllm
from ftray.engine import native

_ALL = SECTIONS | {"pace": pace, "http": http, "steady": steady, "victim": victim, "vllm": vllm}
_QUICK = {"40m": 64, "235m": 24}
_LONG = {"40m": 128, "235m": 64}


def main() -> None:
    """Run the parts asked for; the last line is the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(_ALL), default=list(_ALL))
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="how often every arm runs; 2, or 5 with --long")
    parser.add_argument("--batches", nargs="*", type=int, default=[16, 32], help="what the peer chooses from")
    parser.add_argument("--long", action="store_true", help="longer answers and more rounds")
    parser.add_argument("--folder", type=Path, help="keep tokenizer, bases and adapters here")
    parser.add_argument("--json", action="store_true", help="one JSON line only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {
        "benchmark": "serve",
        "cpus": os.cpu_count(),
        "threads": options.threads,
        "dtype": options.dtype,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "native_kernels": native.available(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        setup = Setup((options.folder or Path(temporary)).resolve(), options.dtype)
        setup.folder.mkdir(parents=True, exist_ok=True)
        rounds = options.rounds or (5 if options.long else 2)
        section = Section(setup, rounds, _LONG if options.long else _QUICK, options.batches)
        for shape in options.shapes:
            figures[shape] = {}
            for name in options.only:
                found = {key: _rounded(value) for key, value in _ALL[name](section, shape).items()}
                figures[shape] |= found
                if not options.json:
                    print(json.dumps({shape: {name: found}}), flush=True)
    print(json.dumps(figures))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
