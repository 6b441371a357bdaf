"""Adapters, several workers, checkpoints and Ray: what they cost beside the plain run."""

import os
import socket
import statistics
from typing import Any

from benchmarks.train.driver import interleave, median, ratio
from benchmarks.train.sections import Figures, Setup
from benchmarks.train.setup import LLAMA, make_recipe

_LENGTH = 512


def lora(setup: Setup) -> Figures:
    """LoRA over a frozen bfloat16 base, ours and PEFT's layers in our loop; and full fine-tuning."""
    base = {
        "model_name_or_path": "",
        "tokenizer_name_or_path": str(setup.folder / "base"),
        "init": "config",
        "config": LLAMA,
    }
    frozen = base | {"dtype": "bfloat16"}
    # Names of classes and no catalog names: what trains is all that differs.
    specs = [
        setup.ours(_LENGTH, 1, "lora", model=frozen, adapt={"type": "lora", "r": 16, "lora_alpha": 32.0}),
        setup.ours(_LENGTH, 1, "peft", model=frozen, adapt={"type": "benchmarks.train.peft_arm:PeftLoRA"}),
        setup.ours(_LENGTH, 1, "full", model=base),
    ]
    found = interleave(specs, setup.steps, setup.log)
    return {
        "lora_ratio_vs_peft": round(ratio(found["lora"], found["peft"], "cpu_s"), 3),
        "lora_ratio_vs_full": round(ratio(found["lora"], found["full"], "cpu_s"), 3),
        "lora_losses": [[round(record["loss"], 4) for record in found[name]] for name in ("lora", "peft")],
        "lora_peak_mb": {name: round(found[name][-1]["peak_bytes"] / 2**20) for name in found},
    }


def ranks(setup: Setup) -> Figures:
    """Two workers of one thread, each with as many rows as the one that is alone.

    By wall time, which counts waiting and other work on the cores, and by CPU time of both, which counts neither.
    """
    figures: Figures = {}
    size = make_recipe(setup.folder, _LENGTH).train.global_batch_size
    for strategy in ("ddp", "fsdp"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        changes: dict[str, Any] = {
            "strategy": {"type": strategy, "num_workers": 2},
            "train": {"global_batch_size": 2 * size},
        }
        group = [
            setup.ours(_LENGTH, 1, strategy, **changes)
            | {"rank": rank, "world": 2, "port": port, "run": f"{strategy}-{os.getpid()}"}
            for rank in range(2)
        ]
        found = interleave([setup.ours(_LENGTH, 1, "alone"), *group], setup.steps, setup.log)
        rates = {name: _rate(found[name], "wall_s") for name in ("alone", strategy)}
        figures[f"{strategy}_2_workers_efficiency"] = round(rates[strategy] / (2 * rates["alone"]), 3)
        figures[f"{strategy}_tokens_per_s"] = {name: round(rate) for name, rate in rates.items()}
        costs = {name: _rate(found[name], "ranks_cpu_s") for name in rates}
        figures[f"{strategy}_2_workers_cpu_efficiency"] = round(costs[strategy] / costs["alone"], 3)
    return figures


def _rate(records: list[dict[str, Any]], seconds: str, warm: int = 2) -> float:
    tokens = records[-1]["tokens"] - records[warm - 1]["tokens"]
    return float(tokens / sum(record[seconds] for record in records[warm:]))


def checkpoint(setup: Setup) -> Figures:
    """How long a step waits for a checkpoint of weights and both moments, written beside it or at once."""
    spec = setup.ours(_LENGTH, 1, "checkpoint") | {"arm": "checkpoint"}
    records = interleave([spec], setup.steps, setup.log)["checkpoint"]
    return {
        "checkpoint_stall_s": round(median(records, "asynchronous_s"), 4),
        "checkpoint_stall_sync_s": round(median(records, "synchronous_s"), 4),
        "checkpoint_mb": round(records[-1]["checkpoint_bytes"] / 2**20),
    }


def on_ray(setup: Setup) -> Figures:
    """One Ray Train worker against the same run in a plain process, and the time until its first step."""
    changes = {"train": {"max_steps": 2 + setup.steps}}
    local = setup.ours(_LENGTH, 1, "local", **changes)
    plain = interleave([local], setup.steps, setup.log)["local"]
    remote = setup.ours(_LENGTH, 1, "ray", strategy={"type": "ddp", "num_workers": 1}, **changes)
    records = interleave([remote | {"arm": "launch"}], 1, setup.log)["ray"]
    steps = records[0]["step_s"][2:]
    return {
        "ray_overhead_s_per_step": round(statistics.median(steps) - median(plain, "wall_s"), 4),
        "ray_step_s": round(statistics.median(steps), 4),
        "startup_s": round(records[0]["startup_s"], 2),
    }
