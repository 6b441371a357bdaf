"""The comparisons, each a function from the set-up to named figures."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from benchmarks.train.driver import Record, interleave, median, ratio
from benchmarks.train.setup import make_recipe, packed_rows, prepare_folder, step_flops
from ftray.cluster.allocator import environment

Figures = dict[str, Any]
PARAMETERS = 25_500_000
SPREAD_LENGTH = 512
"""Tokens of a row where lengths are not compared."""
_LOSS_TOLERANCE = 0.03  # of bf16 losses near 9, after a few steps


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run of the benchmark measures with."""

    folder: Path
    steps: int
    lengths: tuple[int, ...]
    threads: tuple[int, ...]
    batches: tuple[int, ...]

    def prepare(self) -> None:
        """Texts, tokenizer, model and shards: the arm that came first would hold what preparing takes."""
        prepare_folder(self.folder)
        for length in {*self.lengths, SPREAD_LENGTH}:
            packed_rows(make_recipe(self.folder, length), 1)

    @property
    def log(self) -> Path:
        """Where the arms' own output goes."""
        return self.folder / "arms.log"

    def ours(self, length: int, threads: int, name: str = "ours", **changes: Any) -> Figures:
        """Specification of one of our arms."""
        return self._spec("ours", length, threads, name) | {"changes": changes, "environment": environment()}

    def trl(
        self, length: int, threads: int, name: str, *, batch: int, packing: bool, bf16: bool = True
    ) -> Figures:
        """Specification of a TRL arm: without packing all defaults, with packing no activation checkpointing."""
        settings = {"batch": batch, "packing": packing, "checkpointing": not packing, "bf16": bf16}
        return self._spec("trl", length, threads, name) | settings

    def peak(self, threads: int, dtype: str) -> Figures:
        """Specification of the matrix product."""
        return self._spec("peak", 0, threads, f"peak_{dtype}") | {"dtype": dtype}

    def _spec(self, arm: str, length: int, threads: int, name: str) -> Figures:
        return {
            "arm": arm,
            "name": name,
            "folder": str(self.folder),
            "length": length,
            "threads": threads,
            "steps": self.steps + 1,
        }


def _trl_best(setup: Setup, length: int) -> int:
    """TRL's fastest number of packed rows in a forward pass, of those that are asked for."""
    if len(setup.batches) == 1:
        return setup.batches[0]
    specs = [
        setup.trl(length, 1, f"{batch}", batch=batch, packing=True)
        for batch in setup.batches
        if batch * length <= 4096
    ]
    costs = {}
    for spec in specs:  # one after another: how fast each is alone
        records = interleave([spec], 3, setup.log)[spec["name"]]
        costs[int(spec["name"])] = min(record["cpu_s"] for record in records[1:])
    return min(costs, key=costs.__getitem__)


def _agree(ours: list[Record], theirs: list[Record]) -> float:
    """Largest difference of the losses. Raises AssertionError if they part."""
    found = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))
    assert found < _LOSS_TOLERANCE, f"the loss curves part by {found:.4f}"
    return found


def versus_trl(setup: Setup) -> Figures:
    """Full fine-tuning in bf16 beside TRL's best packing, as its users start it and under our allocator."""
    figures: Figures = {}
    for length in setup.lengths:
        best = _trl_best(setup, length)
        for threads in setup.threads:
            packing = setup.trl(length, threads, "trl_packing", batch=best, packing=True)
            theirs = [packing, packing | {"name": "trl_packing_our_allocator", "environment": environment()}]
            found = _beside(setup, length, threads, theirs) | {"trl_packing_batch": best}
            for suffix in ("", "_our_allocator"):
                peak = found[f"trl_packing{suffix}_peak_mb"]
                found[f"memory_ratio_vs_trl_packing{suffix}"] = round(found["ours_peak_mb"] / peak, 3)
            figures[f"seq{length}_{threads}t"] = found
    return {"versus_trl": figures}


def versus_trl_default(setup: Setup) -> Figures:
    """The same beside what TRL does if nothing is said: no packing, activation checkpointing."""
    return {
        "versus_trl_default": {
            f"seq{length}_{threads}t": _beside(
                setup, length, threads, [setup.trl(length, threads, "trl_default", batch=8, packing=False)]
            )
            for length in setup.lengths
            for threads in setup.threads
        }
    }


def _beside(setup: Setup, length: int, threads: int, theirs: list[Figures]) -> Figures:
    """Our arm, others and the matrix product, interleaved."""
    specs = [setup.ours(length, threads), *theirs, setup.peak(threads, "bfloat16")]
    allocator = Path(environment().get("LD_PRELOAD", "system")).name
    return _compared(setup, length, interleave(specs, setup.steps, setup.log)) | {"our_allocator": allocator}


def _compared(setup: Setup, length: int, found: dict[str, list[Record]]) -> Figures:
    ours = found["ours"]
    size = make_recipe(setup.folder, length).train.global_batch_size
    rows = packed_rows(make_recipe(setup.folder, length), setup.steps)
    flops = [step_flops(rows[i * size : (i + 1) * size], PARAMETERS) for i in range(setup.steps)]
    tokens = [sum(len(row.input_ids) for row in rows[i * size : (i + 1) * size]) for i in range(setup.steps)]
    rates = [record | {"rate": flop / record["cpu_s"]} for record, flop in zip(ours, flops, strict=True)]
    peak = max(record["flops_per_cpu_s"] for record in found["peak_bfloat16"])
    figures: Figures = {
        "fraction_of_matmul_peak_bf16": round(median(rates, "rate") / peak, 3),
        "peak_gflops_bf16": round(peak / 1e9),
    }
    for name in (name for name in found if not name.startswith("peak")):
        records = [
            r | {"t": t / r["cpu_s"], "w": t / r["wall_s"]} for r, t in zip(found[name], tokens, strict=True)
        ]
        figures[f"{name}_tokens_per_cpu_s"] = round(median(records, "t"))
        figures[f"{name}_tokens_per_s"] = round(median(records, "w"))
        figures[f"{name}_peak_mb"] = round(records[-1]["peak_bytes"] / 2**20)
        if name != "ours":
            short = name.replace("packing", "packing_best")
            figures[f"ratio_vs_{short}"] = round(ratio(ours, found[name], "cpu_s"), 3)
            figures[f"wall_ratio_vs_{short}"] = round(ratio(ours, found[name], "wall_s"), 3)
            figures[f"loss_difference_{name}"] = round(_agree(ours, found[name]), 5)
    return figures


def worst(figures: Figures) -> Figures:
    """Of each figure against TRL that has a bar the worst over the lengths and threads that were measured."""
    bars = {
        "ratio_vs_trl_default": min,
        "ratio_vs_trl_packing_best": min,
        "memory_ratio_vs_trl_packing": max,
        "memory_ratio_vs_trl_packing_our_allocator": max,
        "fraction_of_matmul_peak_bf16": min,
    }
    groups = [
        found for key in ("versus_trl", "versus_trl_default") for found in figures.get(key, {}).values()
    ]
    seen = {key: [found[key] for found in groups if key in found] for key in bars}
    return {key: bars[key](values) for key, values in seen.items() if values}


def fp32(setup: Setup) -> Figures:
    """Full fine-tuning in float32 against the machine's float32 matrix product."""
    figures: Figures = {}
    for length in setup.lengths:
        specs = [setup.ours(length, 1, train={"bf16": False}), setup.peak(1, "float32")]
        found = interleave(specs, setup.steps, setup.log)
        recipe = make_recipe(setup.folder, length)
        size, rows = recipe.train.global_batch_size, packed_rows(recipe, setup.steps)
        flops = [step_flops(rows[i * size : (i + 1) * size], PARAMETERS) for i in range(setup.steps)]
        peak = max(record["flops_per_cpu_s"] for record in found["peak_float32"])
        rates = [r | {"rate": flop / r["cpu_s"]} for r, flop in zip(found["ours"], flops, strict=True)]
        figures[f"seq{length}"] = round(median(rates, "rate") / peak, 3)
        figures["peak_gflops"] = round(peak / 1e9)
        assert math.isfinite(figures[f"seq{length}"])
    first = f"seq{setup.lengths[0]}"
    return {"fraction_of_matmul_peak_fp32": figures[first], "fp32": figures}
