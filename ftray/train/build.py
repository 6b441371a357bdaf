"""A recipe's model, and the precision it is trained in."""

import dataclasses
from typing import Any

from ftray.config.recipe import Recipe
from ftray.model.build import build_structure, load_weights
from ftray.model.folder import resolve_folder
from ftray.model.precision import bf16_is_faster
from ftray.train.checkpoint import State


def build_model(recipe: Recipe) -> Any:
    """Structure on meta, then the adapter, then the strategy's sharding, then the weights."""
    model: Any = build_structure(recipe.model, seed=recipe.seed)
    recipe.adapt.apply(model, recipe.seed)
    model = recipe.strategy.prepare(model)
    if recipe.model.init == "pretrained":
        load_weights(model, resolve_folder(recipe.model.model_name_or_path))
    return model.train()


def choose_precision(recipe: Recipe, model: Any, state: State) -> State:
    """The state with its precision: the recipe's; with `auto`, what the run began with, else what is faster."""
    bf16 = state.bf16 if recipe.train.bf16 == "auto" else recipe.train.bf16
    if bf16 is None:
        bf16 = bool(recipe.strategy.share(bf16_is_faster(model.config.get_text_config().hidden_size)))
    return dataclasses.replace(state, bf16=bf16)
