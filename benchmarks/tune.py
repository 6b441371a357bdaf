"""What searching costs, and what population-based training finds for the same tokens.

    python -m benchmarks.tune --json

`tune_efficiency`: seconds of trials over (wall x slots), of a search over Ray Tune with reused actors; a trial's
seconds are all from its model's building to its delta, those of `tune_steps_efficiency` the ones it takes steps in.
`tune_spread_...`: the same where each trial is a Ray Train group of as many workers as there are slots, with a CPU
for each; the seconds of a trial then hold the start of its group.
Its base is a small Llama trained here on docstrings of the standard library; the rows are functions of it with the
first line of their docstring. `pbt_vs_random`, `pbt_vs_asha`: see `benchmarks/tune_policies.py`; needs a walked
quickstart (`ftray quickstart`) in this directory.
The figures of populations are those of `benchmarks.population`.
"""

import argparse
import ast
import json
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import population
from benchmarks.tune_policies import compare, compared
from ftray.cluster.ray_session import session
from ftray.config.load import write_resolved
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.spec import parse
from ftray.train.track.jsonl import read_records
from ftray.tune.ray_trials import run
from ftray.tune.result import TuneResult

_SHORT = 40
"""Steps of the trials that say how long a step takes."""

SPACE = {
    "optim.learning_rate": {"loguniform": [1e-4, 1e-1]},
    "optim.weight_decay": {"loguniform": [1e-3, 1.0]},
    "adapt.r": {"choice": [2, 4, 8, 16]},
}


def rows() -> Iterator[dict[str, str]]:
    """A prompt for each documented function of the standard library, its answer the docstring's first line."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if isinstance(node, ast.FunctionDef) and text:
                yield {
                    "prompt": f"def {node.name}({ast.unparse(node.args)}):\n# Answer:",
                    "completion": f" {text.splitlines()[0][:80]}",
                }


class Bench:
    """The rows, the base and the recipe of every arm, in one folder.

    Args:
        folder: where everything lies.
        base_steps: steps of training of the base.
    """

    def __init__(self, folder: Path, base_steps: int) -> None:
        self.folder = folder
        found = [row for row in rows() if len(row["prompt"]) < 160]
        for name, part in (("train", found[::2]), ("validation", found[1:600:4])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}.jsonl").write_text(lines)
        self.base = self._train_base(base_steps)

    def _train_base(self, steps: int) -> Path:
        from ftray.testing.tiny import tiny_base
        from ftray.train.io import LocalIO
        from ftray.train.worker import train

        start = tiny_base(self.folder / "random")
        changes = {
            "adapt": "full",
            "objective": "lm",
            "optim": {"type": "adamw", "learning_rate": 3e-3},
            "train": {"max_steps": steps, "global_batch_size": 8, "bf16": False},
        }
        result = train(self._recipe(start, "base", **changes), LocalIO(self.folder / "base"))
        assert result.delta is not None
        return result.delta

    def _recipe(self, base: Path, name: str, **changes: Any) -> Recipe:
        tree: dict[str, Any] = {
            "name": name,
            "output_dir": str(self.folder),
            "model": {"model_name_or_path": str(base)},
            "data": {
                "train": str(self.folder / "train.jsonl"),
                "validation": str(self.folder / "validation.jsonl"),
                "max_length": 256,
                "cache_dir": str(self.folder / "cache"),
            },
            "adapt": {"type": "lora", "r": 8},
            "objective": "sft",
            "optim": "adamw",
            "lr_scheduler": "constant",
            "strategy": "single",
            "train": {"max_steps": 1, "global_batch_size": 4, "bf16": False},
        }
        return parse(Recipe, tree | changes)

    def search(self, name: str, seed: int, **changes: Any) -> TuneConfig:
        """A search over the common recipe."""
        write_resolved(self._recipe(self.base, "member", seed=seed), self.folder / f"recipe-{seed}.yaml")
        settings = {
            "name": name,
            "output_dir": str(self.folder / "searches"),
            "recipe": str(self.folder / f"recipe-{seed}.yaml"),
            "space": SPACE,
            "seed": seed,
        }
        return parse(TuneConfig, settings | changes)

    def efficiency(self, trial_s: float, slots: int) -> dict[str, float]:
        """What is made of the CPUs: two trials a slot, of about `trial_s` each; then two runs of many workers."""
        with session(num_cpus=slots):
            alone = self._spent("alone", trial_s, slots, num_trials=2 * slots, max_concurrent=slots)
            group = f"strategy={{type: ddp, num_workers: {slots}, cpus_per_worker: 0.9}}"
            spread = self._spent("spread", trial_s, 1, spread=True, overrides=[group], num_trials=2)
        figures = {"slots": slots, **alone}
        return figures | {name.replace("tune", "tune_spread", 1): value for name, value in spread.items()}

    def _spent(
        self, name: str, trial_s: float, side_by_side: int, num_trials: int, **changes: Any
    ) -> dict[str, float]:
        """Parts of wall x CPUs, of trials of which so many run side by side, after short ones for their length."""
        one = {"policy": "random", "num_segments": 1, "max_concurrent": side_by_side} | changes
        short = run(self.search(f"{name}-short", 0, **one, num_members=side_by_side, segment_steps=_SHORT))
        steps = round(_SHORT * trial_s / (stepped_s(short) / side_by_side))
        config = self.search(name, 0, **one, num_members=num_trials, segment_steps=steps)
        started = time.perf_counter()
        result = run(config)
        wall_s = time.perf_counter() - started
        whole = wall_s * side_by_side
        return {
            "tune_efficiency": round(result.cost.seconds / whole, 4),
            "tune_steps_efficiency": round(stepped_s(result) / whole, 4),
            "tune_trials": result.num_segments,
            "tune_mean_trial_s": round(result.cost.seconds / result.num_segments, 1),
            "tune_wall_s": round(wall_s, 1),
        }


def stepped_s(result: TuneResult) -> float:
    """Seconds that the trials of a search took steps in, summed."""
    found = 0.0
    for path in (result.folder / "segments").glob("*/metrics.jsonl"):
        found += max(record.get("elapsed_s", 0.0) for record in read_records(path))
    return found


def main() -> None:
    """Print one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument(
        "--trial-s", type=float, default=30.0, help="seconds of a trial for `tune_efficiency`"
    )
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--only", choices=["efficiency", "policies", "population"])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ftray-tune-"))
    figures: dict[str, Any] = {
        "benchmark": "tune",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    try:
        if arguments.only in (None, "population"):
            figures |= population.measure()
        if arguments.only in (None, "policies"):
            found = {}
            for seed in range(arguments.seeds):
                found[seed] = compare(folder, seed)
                if not arguments.json:
                    print(
                        seed,
                        {name: round(result.score, 4) for name, result in found[seed].items()},
                        flush=True,
                    )
            figures |= compared(found)
        if arguments.only in (None, "efficiency"):
            figures |= Bench(folder, arguments.base_steps).efficiency(arguments.trial_s, arguments.slots)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
