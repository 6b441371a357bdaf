"""A recipe's model, and the precision it is trained in."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ftray.config.recipe import ModelConfig, Recipe
from ftray.core.errors import ModelError
from ftray.model.build import build_structure, load_weights, move_rest
from ftray.model.folder import resolve_folder
from ftray.model.fuse import fuse
from ftray.model.linear import cast_twice
from ftray.optim.ema import Ema
from ftray.optim.first_order import FirstOrder
from ftray.train.checkpoint import State
from ftray.train.feed import Feed
from ftray.train.malloc import keep_freed_memory


def build_model(recipe: Recipe) -> Any:
    """Structure on meta, then the adapter, then the strategy's sharding, then the weights."""
    keep_freed_memory()
    return place(recipe, structure_of(recipe), recipe.model).train()


def structure_of(recipe: Recipe, *, empty: bool = False) -> Any:
    """The model that trains, before any weight is read; with `empty`, also one that begins with random weights."""
    model: Any = build_structure(recipe.model, seed=recipe.seed, empty=empty)
    recipe.adapt.apply(model, recipe.seed)
    recipe.objective.extend(model, recipe.seed)
    fuse(model)
    cast_twice(model)
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(model)
    return model


def place(recipe: Recipe, model: Any, config: ModelConfig) -> Any:
    """Spread a structure by the recipe's strategy and read its weights, where the configuration names any."""
    model = recipe.strategy.prepare(model, bf16=surely_bf16(recipe))
    device = recipe.strategy.device
    if config.init == "pretrained":
        load_weights(model, resolve_folder(config.model_name_or_path), device, recipe.strategy.keep_part)
    move_rest(model, device)
    return model


def build_optimizers(
    recipe: Recipe, parameters: Mapping[str, torch.nn.Parameter]
) -> list[torch.optim.Optimizer]:
    """The recipe's optimisers, and behind them what averages the weights they make."""
    optimizers: list[torch.optim.Optimizer] = recipe.optim.build(parameters)
    decay = recipe.train.ema_decay
    return optimizers if decay is None else [*optimizers, Ema(parameters.values(), decay)]


def surely_bf16(recipe: Recipe) -> bool:
    """True if the run computes in bfloat16 before anything is timed: it is told to, or `auto` on a GPU."""
    if recipe.train.bf16 == "auto":
        return recipe.strategy.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return recipe.train.bf16


def checkpoint_layers(model: Any) -> None:
    """Compute each layer again in the backward pass. Raises `ModelError` if the architecture has no such layers."""
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        name = type(model).__name__
        raise ModelError(
            f"train.gradient_checkpointing: {name} does not support it; set it to false"
        ) from None


def choose_precision(recipe: Recipe, engine: FirstOrder, feed: Feed, state: State) -> State:
    """Set the engine's precision and keep it in the state.

    The recipe's word counts; with `auto`, what the run began with, else the faster of a few timed passes over the
    first batch (every rank takes part, rank 0 decides).
    """
    bf16 = state.bf16 if recipe.train.bf16 == "auto" else recipe.train.bf16
    if bf16 is None and surely_bf16(recipe):
        bf16 = True
    if bf16 is None:
        batch = feed.batches(state.step)[0]
        bf16 = bool(recipe.strategy.share(engine.time_s(batch, True) < engine.time_s(batch, False)))
    engine.bf16 = bf16
    return dataclasses.replace(state, bf16=bf16)
