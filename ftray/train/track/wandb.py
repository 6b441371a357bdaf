"""Metrics for Weights & Biases."""

import os
from pathlib import Path
from typing import Any

from ftray.config.load import to_yaml
from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError
from ftray.core.spec import dump, spec


@spec
class WandB:
    """A Weights & Biases run; offline unless a key is there (`WANDB_API_KEY`, or `WANDB_MODE` says otherwise)."""

    project: str = ""
    """Project; empty: `WANDB_PROJECT`, else `ftray`."""

    def open(self, recipe: Recipe, run_dir: Path, from_step: int) -> "WandBSink":
        """Start or go on with the run; its id is the run's name, so a resumed run stays one."""
        try:
            import wandb
        except ImportError:
            raise ConfigError("tracking: wandb is not installed; run `pip install 'ftray[wandb]'`") from None
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        run = wandb.init(
            project=self.project or os.environ.get("WANDB_PROJECT", "ftray"),
            name=recipe.name,
            dir=str(run_dir),
            mode=mode,  # type: ignore[arg-type]
            config=dump(recipe) | {"recipe_yaml": to_yaml(recipe)},
            resume="allow" if from_step else None,
            id=recipe.name if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        return WandBSink(run)


class WandBSink:
    """An open Weights & Biases run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, record: dict[str, Any]) -> None:
        """One history row."""
        metrics = {key: value for key, value in record.items() if key != "step"}
        self._run.log(metrics, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
