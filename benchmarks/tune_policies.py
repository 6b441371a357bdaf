"""What each policy finds for the same tokens: best validation loss on the quickstart's data, base and space.

Every arm trains 16 segments of the quickstart's search: 4 members of 4, or 8 + 4 + 2 + 2 by halving.
"""

import statistics
from pathlib import Path
from typing import Any

from ftray.config.load import load
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.errors import ConfigError
from ftray.tune.local import run_local
from ftray.tune.result import TuneResult

SEARCH = Path("examples/quickstart/tune.yaml")
ARMS: dict[str, list[str]] = {
    "pbt": ["policy=pbt", "num_members=4"],
    "random": ["policy=random", "num_members=4"],
    "asha": ["policy={type: asha, reduction_factor: 2}", "num_members=8"],
}


def compare(folder: Path, seed: int) -> dict[str, TuneResult]:
    """Every arm with one seed, one segment after the other in this process.

    Args:
        folder: where the searches are kept.
        seed: of the search and of the recipe.

    Raises:
        ConfigError: if the quickstart has not been walked in this directory.
    """
    found = {}
    for name, changes in ARMS.items():
        settings = [*changes, f"seed={seed}", f"name={name}-{seed}", f"output_dir={folder}"]
        config = load(TuneConfig, SEARCH, settings)
        recipe = load(Recipe, Path(config.recipe), [*config.overrides, f"seed={seed}", "train.bf16=true"])
        if not Path(recipe.model.model_name_or_path).is_dir():
            raise ConfigError(f"{recipe.model.model_name_or_path}: not here; run `ftray quickstart` first")
        found[name] = run_local(config, recipe)
    return found


def compared(found: dict[int, dict[str, TuneResult]]) -> dict[str, Any]:
    """Losses and tokens of every arm and seed, and pbt against the others; negative is for pbt."""

    def against(other: str) -> dict[str, float]:
        differences = [arms["pbt"].score - arms[other].score for arms in found.values()]
        return {
            "mean_difference": round(statistics.mean(differences), 4),
            "lowest": round(min(differences), 4),
            "highest": round(max(differences), 4),
            "pbt_better": sum(difference < 0 for difference in differences),
            "seeds": len(differences),
        }

    return {
        "pbt_vs_random": against("random"),
        "pbt_vs_asha": against("asha"),
        "runs": [
            {
                "seed": seed,
                "policy": name,
                "eval_loss": round(result.score, 4),
                "tokens": result.cost.tokens,
                "segments": result.num_segments,
                "cpu_s": result.cost.cpu_s,
                "config": result.config,
            }
            for seed, arms in found.items()
            for name, result in arms.items()
        ],
    }
