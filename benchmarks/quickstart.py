"""How well the quickstart's two tasks are learned, over seeds.

    python -m benchmarks.quickstart --seeds 3 --json

Needs the corpus and the base that `ftray quickstart` leaves in `runs/quickstart`. Each task is trained once a seed
by its own recipe (two Ray Train workers) and asked its held-out questions.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
from pathlib import Path
from typing import Any

from ftray.cluster.ray_session import session
from ftray.config.evaluate import EvalConfig
from ftray.config.load import load
from ftray.config.recipe import Recipe
from ftray.eval.report import BASE, CONSTANT, RANKING
from ftray.eval.run import evaluate_config
from ftray.train.ray_launch import launch

EXAMPLES = Path("examples/quickstart")
TASKS = ("raises", "describe")


def measure(task: str, seed: int) -> dict[str, Any]:
    """Train one task with one seed and score it."""
    overrides = [f"seed={seed}", f"name=bench-{task}-{seed}"]
    recipe = load(Recipe, EXAMPLES / f"{task}.yaml", overrides)
    folder = Path(recipe.output_dir) / recipe.name
    shutil.rmtree(folder, ignore_errors=True)
    result = launch(recipe)
    delta = os.path.relpath(str(result.delta))
    settings = [f"deltas=[{delta!r}]", f"output={folder}/eval.json"]
    report = evaluate_config(load(EvalConfig, EXAMPLES / f"eval-{task}.yaml", settings))
    rates = {name: report.result(name).interval.estimate for name in (BASE, CONSTANT, RANKING)}
    tuned = report.result(delta).interval
    return {
        "task": task,
        "seed": seed,
        "steps": result.step,
        "eval_loss": round(result.metrics["eval_loss"], 4),
        "rows": len(report.expected),
        "base": rates[BASE],
        "best_constant": round(rates[CONSTANT], 4),
        "base_ranking": round(rates[RANKING], 4),
        "tuned": round(tuned.estimate, 4),
        "tuned_low": round(tuned.low, 4),
        "tuned_high": round(tuned.high, 4),
        "beats_all": report.beats_all(delta),
    }


def main() -> None:
    """Print a line for each run and a summary last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON only")
    arguments = parser.parse_args()
    results = []
    with session():
        for seed in range(arguments.seeds):
            for task in TASKS:
                results.append(measure(task, seed))
                if not arguments.json:
                    print(json.dumps(results[-1]), flush=True)
    summary: dict[str, Any] = {
        "benchmark": "quickstart",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        summary["cpu"] = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    for task in TASKS:
        tuned = [result["tuned"] for result in results if result["task"] == task]
        summary[task] = {
            "tuned_min": min(tuned),
            "tuned_median": statistics.median(tuned),
            "tuned_max": max(tuned),
        }
    print(json.dumps({**summary, "runs": results}))


if __name__ == "__main__":
    main()
