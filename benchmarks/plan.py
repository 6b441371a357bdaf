"""Peak memory that `ftray plan` predicts against the peak of real runs.

    python -m benchmarks.plan [--json] [--configurations 12] [--seed 41] [--fit]

Random configurations (model size, sequence, batch, LoRA or full, checkpointing, precision) are planned, then
trained for a few steps, each in a fresh process. The measured peak is the process's highest resident memory while
it trains, less what it held after its imports. The configurations reported are held out: the constants of
`ftray.train.plan` were fitted on others (`--fit` draws those and prints the constants that fit them).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HELD_OUT_SEED, FIT_SEED = 41, 3
# Tokens of a micro batch times parameters: bounds the seconds a configuration takes.
_MOST_WORK = 1.2e11


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line last")
    parser.add_argument("--configurations", type=int, default=12)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the held-out configurations")
    parser.add_argument("--fit", action="store_true", help="fit the constants on the other configurations")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(Path(arguments.child))
        return
    draw = random.Random(FIT_SEED if arguments.fit else arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = [_measure(Path(folder) / str(n), draw_config(draw)) for n in range(arguments.configurations)]
    if arguments.fit:
        factors, overhead = fit(found)
        print(f"FACTOR = {factors}  OVERHEAD_BYTES = {overhead >> 20} << 20")
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in found]
    summary = {
        "configurations": len(found),
        "median_error": round(statistics.median(errors), 4),
        "worst_error": round(max(errors), 4),
        "slowest_plan_s": max(row["plan_s"] for row in found),
        "rows": found,
    }
    print(f"median error {summary['median_error']:.1%}, worst {summary['worst_error']:.1%}")
    if arguments.json:
        print(json.dumps(summary))


def draw_config(draw: random.Random) -> dict[str, Any]:
    """One random configuration that trains in seconds."""
    while True:
        heads = draw.choice([4, 6, 8, 10])
        config: dict[str, Any] = {
            "hidden_size": heads * 64,
            "intermediate_size": heads * 64 * draw.choice([2, 3, 4]),
            "num_hidden_layers": draw.randint(2, 10),
            "num_attention_heads": heads,
            "num_key_value_heads": draw.choice([heads, heads // 2]),
            "vocab_size": draw.choice([2000, 8000, 16000, 32000]),
            "tie_word_embeddings": draw.random() < 0.5,
            "max_length": draw.choice([128, 256, 512, 1024]),
            "micro": draw.choice([1, 2, 4, 8]),
            "accumulation": draw.choice([1, 2]),
            "adapt": draw.choice(["full", "lora"]),
            "gradient_checkpointing": draw.random() < 0.4,
            "bf16": draw.random() < 0.5,
        }
        size = config["hidden_size"] * (
            config["vocab_size"] * (1 if config["tie_word_embeddings"] else 2)
            + config["num_hidden_layers"] * (4 * config["hidden_size"] + 3 * config["intermediate_size"])
        )
        if size > 8e6 and size * config["max_length"] * config["micro"] * config["accumulation"] < _MOST_WORK:
            return config


def _measure(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    recipe = _write_recipe(folder, config)
    from ftray.cluster import allocator

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan", "--child", str(recipe)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **allocator.environment()},  # as `ftray run` starts
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    measured = json.loads(done.stdout.splitlines()[-1])
    from ftray.config.load import load
    from ftray.config.recipe import Recipe
    from ftray.train.plan import gib, plan

    start = time.perf_counter()
    found = plan(load(Recipe, recipe))
    row = {
        **config,
        "parameters": found.parameters,
        "counted": found.memory.peak,
        "weights": found.memory.weights,
        "predicted": found.peak_bytes,
        "measured": measured["peak"],
        "plan_s": round(time.perf_counter() - start, 2),
        "run_s": measured["run_s"],
    }
    bf16, again = config["bf16"], config["gradient_checkpointing"]
    kinds = f"{config['adapt']:4} {'bf16' if bf16 else 'fp32'} {'ckpt' if again else '    '}"
    print(
        f"{found.parameters / 1e6:6.1f}M  {config['max_length']:4} x {config['micro']}  {kinds}  counted "
        f"{gib(row['counted']):>9}  predicted {gib(row['predicted']):>9}  measured {gib(row['measured']):>9}  "
        f"{row['predicted'] / row['measured'] - 1:+.1%}",
        flush=True,
    )
    return row


def _write_recipe(folder: Path, config: dict[str, Any]) -> Path:
    import torch
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    from ftray.testing.tiny import byte_tokenizer

    base = folder / "base"
    byte_tokenizer(base)
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    shape = {key: config[key] for key in (*keys, "vocab_size", "tie_word_embeddings")}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(base)
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(500)]
    lines = (json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(20, 200)))}) for _ in range(400))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    batch = config["micro"] * config["accumulation"]
    recipe = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "model": {"model_name_or_path": str(base)},
        "data": {
            "train": str(folder / "text.jsonl"),
            "max_length": config["max_length"],
            "cache_dir": str(folder / "cache"),
        },
        "adapt": config["adapt"],
        "objective": "lm",
        "optim": "adamw",
        "lr_scheduler": "constant",
        "strategy": "single",
        "train": {
            "max_steps": 4,  # most kernels that bfloat16 products keep are there by then
            "global_batch_size": batch,
            "per_device_train_batch_size": config["micro"],
            "gradient_checkpointing": config["gradient_checkpointing"],
            "bf16": config["bf16"],
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _child(path: Path) -> None:
    """Train a recipe in this process; prints its peak resident bytes over those after the imports."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from ftray.config.load import load
    from ftray.config.recipe import Recipe
    from ftray.data.prepare import prepare_local
    from ftray.train.io import LocalIO
    from ftray.train.worker import train

    recipe = load(Recipe, path)
    prepare_local(recipe.data, recipe.model.tokenizer, "train")
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    start = time.perf_counter()
    train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name))
    peak = _status("VmHWM") - before
    print(json.dumps({"peak": peak, "baseline": before, "run_s": round(time.perf_counter() - start, 2)}))


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def fit(rows: list[dict[str, Any]]) -> tuple[dict[str, float], int]:
    """A factor for each precision and one constant, with the least mean and worst relative error together."""

    from ftray.model.precision import KERNEL_BYTES

    def error(part: list[dict[str, Any]], factor: float, overhead: int) -> float:
        fixed = [row["weights"] + (KERNEL_BYTES if row["bf16"] else 0) for row in part]
        rest = [(r["counted"] - r["weights"], r["measured"] - f) for r, f in zip(part, fixed, strict=True)]
        errors = [
            abs(factor * counted + overhead - measured) / row["measured"]
            for row, (counted, measured) in zip(part, rest, strict=True)
        ]
        return statistics.mean(errors) + max(errors)

    best: tuple[float, dict[str, float], int] = (float("inf"), {}, 0)
    kinds = {name: [r for r in rows if r["bf16"] == (name == "bfloat16")] for name in ("float32", "bfloat16")}
    for overhead in range(0, 200 << 20, 5 << 20):
        factors = [1 + n / 100 for n in range(60)]
        found = {
            name: min(factors, key=lambda factor: error(part, factor, overhead))
            for name, part in kinds.items()
            if part
        }
        total = sum(error(kinds[name], factor, overhead) for name, factor in found.items())
        best = min(best, (total, found, overhead), key=lambda candidate: candidate[0])
    return best[1], best[2]


if __name__ == "__main__":
    main()
