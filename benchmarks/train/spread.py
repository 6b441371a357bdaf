"""Adapters, several workers, checkpoints and Ray: what they cost beside the plain run."""

import os
import socket
import statistics
from typing import Any

from benchmarks.train import step_clock
from benchmarks.train.driver import arms, interleave, median, ratio
from benchmarks.train.sections import SPREAD_LENGTH, Figures, Setup
from benchmarks.train.setup import LLAMA, make_recipe

_WARM = 2
_RAY_STEPS = 12


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
        setup.ours(
            SPREAD_LENGTH, 1, "lora", model=frozen, adapt={"type": "lora", "r": 16, "lora_alpha": 32.0}
        ),
        setup.ours(
            SPREAD_LENGTH, 1, "peft", model=frozen, adapt={"type": "benchmarks.train.peft_arm:PeftLoRA"}
        ),
        setup.ours(SPREAD_LENGTH, 1, "full", model=base),
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
    size = make_recipe(setup.folder, SPREAD_LENGTH).train.global_batch_size
    for strategy in ("ddp", "fsdp"):
        port = _free_port()
        changes: dict[str, Any] = {
            "strategy": {"type": strategy, "num_workers": 2},
            "train": {"global_batch_size": 2 * size},
        }
        group = [
            setup.ours(SPREAD_LENGTH, 1, strategy, **changes)
            | {"rank": rank, "world": 2, "port": port, "run": f"{strategy}-{os.getpid()}"}
            for rank in range(2)
        ]
        found = interleave([setup.ours(SPREAD_LENGTH, 1, "alone"), *group], setup.steps, setup.log)
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
    spec = setup.ours(SPREAD_LENGTH, 1, "checkpoint") | {"arm": "checkpoint"}
    records = interleave([spec], setup.steps, setup.log)["checkpoint"]
    return {
        "checkpoint_stall_s": round(median(records, "asynchronous_s"), 4),
        "checkpoint_stall_sync_s": round(median(records, "synchronous_s"), 4),
        "checkpoint_mb": round(records[-1]["checkpoint_bytes"] / 2**20),
    }


def on_ray(setup: Setup) -> Figures:
    """The same run in a plain process and as one Ray Train worker, in turn step by step on the same rows.

    A step's overhead is counted in CPU time of the process that trains, which other work on the cores does not
    enter; half the range between the quartiles of the differences says how far it can be trusted. What Ray's own
    processes and the driver take beside the steps is counted apart.
    """
    count = max(_RAY_STEPS, setup.steps)
    strategies = {"plain": {"type": "single"}, "ray": {"type": "ddp", "num_workers": 1}}
    paths = {name: setup.folder / f"steps-{name}-{os.getpid()}.jsonl" for name in strategies}
    specs = [
        setup.ours(
            SPREAD_LENGTH,
            1,
            name,
            strategy=strategy,
            optim={"type": "benchmarks.train.step_clock:TimedAdamW", "path": str(paths[name])},
            train={"max_steps": count + 1},
        )
        | {"arm": "launch"}
        for name, strategy in strategies.items()
    ]
    with arms(specs, setup.log) as (plain_arm, ray_arm):
        for name, arm in (("ray", ray_arm), ("plain", plain_arm)):  # Ray starts with nothing beside it
            arm.go()
            step_clock.begin(paths[name])
        plain, ray = step_clock.take_turns(list(paths.values()), count)
        launched = ray_arm.answer()
        plain_arm.answer()
    over = {key: _over(plain, ray, key) for key in ("cpu_s", "wall_s")}
    quartiles = statistics.quantiles(over["cpu_s"], n=4)
    step_s = statistics.median(step["cpu_s"] for step in ray[_WARM:])
    return {
        "ray_overhead_s_per_step": round(statistics.median(over["cpu_s"]), 4),
        "ray_overhead_half_quartile_range_s": round((quartiles[2] - quartiles[0]) / 2, 4),
        "ray_overhead_wall_s_per_step": round(statistics.median(over["wall_s"]), 4),
        "ray_step_cpu_s": round(step_s, 4),
        "ray_other_processes_cpu_s_per_step": round(launched["all_cpu_s_per_step"] - step_s, 4),
        "ray_steps": count - _WARM,
        "startup_s": round(launched["startup_s"], 2),
    }


def _over(plain: list[dict[str, float]], other: list[dict[str, float]], key: str) -> list[float]:
    """How much longer each step took than the same step of the plain run."""
    return [b[key] - a[key] for a, b in zip(plain[_WARM:], other[_WARM:], strict=True)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
