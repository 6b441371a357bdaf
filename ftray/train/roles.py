"""The models of a run besides the one that trains: a frozen reference, a teacher.

Each is built as the trained one is, on meta and spread by the strategy before its weights are read, so that no rank
ever holds a whole one where the strategy shards.
"""

import json
from typing import Any

from ftray.config.recipe import ModelConfig, Recipe
from ftray.core.errors import ConfigError
from ftray.model.build import build_structure
from ftray.model.policy import Policy
from ftray.model.tokenizer import load_tokenizer
from ftray.train.build import place


def build_policy(recipe: Recipe, model: Any) -> Policy:
    """The trained model with the frozen ones its objective asks for.

    Raises:
        ConfigError: if the teacher's tokenizer is another one.
    """
    reference = teacher = None
    if recipe.objective.needs_reference and not recipe.adapt.facts().detachable:
        # Where every weight trains, what the model was can only be a copy; it is the base, also after a restart.
        reference = _frozen(recipe, recipe.model)
    if recipe.objective.teacher_model:
        check_teacher(recipe)
        teacher = _frozen(
            recipe,
            ModelConfig(model_name_or_path=recipe.objective.teacher_model, dtype=recipe.model.dtype),
        )
    return Policy(model, reference=reference, teacher=teacher)


def check_teacher(recipe: Recipe) -> None:
    """Refuse a teacher that reads other tokens than the student. Raises `ConfigError`, one line."""
    name = recipe.objective.teacher_model
    if name and _token_table(name) != _token_table(recipe.model.tokenizer):
        raise ConfigError(
            f"objective.teacher_model_name_or_path: {name} has another tokenizer than {recipe.model.tokenizer}; "
            "take a teacher of the same family, or let it write the rows and train with `sft`"
        )


def _token_table(name: str) -> Any:
    """What decides which ids a text becomes: the tokenizer without its padding and truncation, which are ours."""
    table = json.loads(load_tokenizer(name).backend_tokenizer.to_str())
    return {key: value for key, value in table.items() if key not in ("padding", "truncation")}


def _frozen(recipe: Recipe, config: ModelConfig) -> Any:
    model = build_structure(config, seed=recipe.seed)
    return place(recipe, model, config).eval()
