"""What searching costs, and what population-based training finds for the same tokens.

    python -m benchmarks.tune --json

`tune_efficiency`: seconds that trials trained over (wall x slots), of a search over Ray Tune with reused actors.
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
from ftray.tune.ray_trials import run

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
        """Seconds of training over wall x slots: two trials a slot, of about `trial_s` each, after a short one."""
        one = {"policy": "random", "num_segments": 1}
        with session(num_cpus=slots):
            short = run(
                self.search("calibrate", 0, **one, num_members=slots, segment_steps=40, max_concurrent=slots)
            )
            steps = round(40 * trial_s / (short.cost.seconds / slots))
            config = self.search(
                "efficiency", 0, **one, num_members=2 * slots, segment_steps=steps, max_concurrent=slots
            )
            started = time.perf_counter()
            result = run(config)
            wall_s = time.perf_counter() - started
        return {
            "tune_efficiency": round(result.cost.seconds / (wall_s * slots), 4),
            "tune_cpu_efficiency": round(result.cost.cpu_s / (wall_s * slots), 4),
            "trials": result.num_segments,
            "mean_trial_s": round(result.cost.seconds / result.num_segments, 1),
            "wall_s": round(wall_s, 1),
            "slots": slots,
        }


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
