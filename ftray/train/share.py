"""What members of a population have in common, and what may differ between them."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError
from ftray.core.facts import check_facts
from ftray.core.paths import value_at
from ftray.core.spec import dump

SHARED = (
    "model",
    "strategy",
    "adapt.type",
    "adapt.target_modules",
    "adapt.target_parameters",
    "objective.teacher_model_name_or_path",
    "train.bf16",
    "train.gradient_checkpointing",
)
"""Fields that belong to the base, to the passes through it or to the group of workers."""


class Population:
    """A population, as a piece of a recipe (`ftray.core.facts`)."""

    needs: ClassVar[Mapping[str, str]] = {"local_optimizer": "steps each member by an optimiser of its own"}


def shared_field(path: str) -> str | None:
    """The field of `SHARED` that a dotted path of a recipe is or lies in; None if members may differ there."""
    return next((field for field in SHARED if path == field or path.startswith(field + ".")), None)


def shared_settings(recipe: Recipe) -> dict[str, Any]:
    """The values of the fields of `SHARED`, and of the seed where it makes the base."""
    tree = dump(recipe)
    fields = (*SHARED, "seed") if recipe.model.init == "config" else SHARED
    return {field: value_at(tree, field) for field in fields}


def check_member(recipe: Recipe) -> None:
    """Refuse a recipe of which no population can be trained. Raises `ConfigError`, one line."""
    recipe.require_own_loop("a population")
    facts = recipe.adapt.facts()
    if not (facts.mixed_batch and facts.detachable):
        raise ConfigError(
            f"adapt: `{dump(recipe)['adapt']['type']}` trains the base that members of a population share; use "
            "`lora`, or search with `executor: trials`"
        )
    check_facts({"executor": Population(), "strategy": recipe.strategy})
    if recipe.train.profile_steps is not None:
        raise ConfigError("train.profile_steps: one trace a process; remove it for a population")


def check_same(first: Recipe, other: Recipe) -> None:
    """Refuse a member that differs from another in what they share. Raises `ConfigError`, one line."""
    theirs = shared_settings(other)
    for field, value in shared_settings(first).items():
        if value != theirs[field]:
            raise ConfigError(
                f"{field}: members of a population share it, but one has {value!r} and another {theirs[field]!r}; "
                "give all the same, or search with `executor: trials`"
            )


def check_rows(recipe: Recipe, rows_per_pass: int | None) -> None:
    """Refuse a member of which no micro batch fits into a pass. Raises `ConfigError`, one line."""
    rows = recipe.train.per_device_train_batch_size
    if rows_per_pass is not None and rows > rows_per_pass:
        raise ConfigError(
            f"rows_per_pass: {rows_per_pass} is less than `train.per_device_train_batch_size`, {rows}, of a "
            "member; lower that one or raise this one"
        )
