"""A user's recipe as a search runs it."""

from typing import Any

from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import dump, replace

LENGTHS = ("max_steps", "num_train_epochs", "max_tokens", "max_time_s")
"""Fields of `train` that limit a run."""


def segment_recipe(config: TuneConfig, recipe: Recipe) -> dict[str, Any]:
    """A user's recipe as the search runs it, as plain data.

    Schedules span all segments, nothing is validated but at a segment's end (checkpoints on the way, which change
    nothing, are taken as the recipe says), and each member is trained by one worker, since how a run is spread
    changes its result by rounding only. `bf16: auto` is a timing, by which members would differ by chance; here it
    means float32.

    Args:
        config: the search, its segments counted in steps or tokens (`in_steps`).
        recipe: the user's.
    """
    unit = "max_steps" if config.segment_tokens is None else "max_tokens"
    limits = {**dict.fromkeys(LENGTHS), unit: config.num_segments * config.segment_length}
    quiet: dict[str, Any] = {"save_total_limit": 1, "save_best": False}
    quiet["early_stopping_patience"] = None  # it would end a member before its segment does
    if config.segment_evaluations is None:
        quiet["eval_steps"] = None
    data = dump(recipe)
    data["train"] |= limits | quiet
    if data["train"]["bf16"] == "auto":
        data["train"]["bf16"] = False
    return {**data, "strategy": data["strategy"] if config.spread else "single", "tracking": []}


def in_steps(config: TuneConfig, recipe: Recipe) -> TuneConfig:
    """The search with its segments counted in optimiser steps.

    Raises:
        ConfigError: if they are counted in validations and the recipe does not validate.
    """
    if config.segment_evaluations is None:
        return config
    if recipe.train.eval_steps is None:
        raise ConfigError(
            "segment_evaluations: the recipe validates at its end only; set its `train.eval_steps`"
        )
    return replace(config, "segment_steps", config.segment_evaluations * recipe.train.eval_steps)
