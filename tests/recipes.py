"""A small corpus and a recipe over it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftray.config.recipe import Recipe
from ftray.core.paths import set_path
from ftray.core.spec import parse


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompt and completion rows that a model can learn: the answer is the prompt's first letter, three times."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
    rows = [
        {"prompt": f"{word}-{i:03d}\n# Answer:", "completion": " " + word[0] * 3}
        for i in range(12)
        for word in words
    ]
    paths = {"train": folder / "train.jsonl", "validation": folder / "validation.jsonl"}
    paths["train"].write_text("".join(json.dumps(row) + "\n" for row in rows[16:]))
    paths["validation"].write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    return paths


MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(tiny_base: Path, corpus: dict[str, Path], tmp_path: Path) -> MakeRecipe:
    """Builds a recipe on the tiny base; keyword arguments are dotted paths with `__` for the dot."""

    def make(name: str = "run", **changes: Any) -> Recipe:
        tree: dict[str, Any] = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "model": {"model_name_or_path": str(tiny_base)},
            "data": {
                "train": str(corpus["train"]),
                "validation": str(corpus["validation"]),
                "max_length": 128,
                "cache_dir": str(tmp_path / "cache"),
            },
            "adapt": {"type": "lora", "r": 4},
            "objective": "sft",
            "optim": {"type": "adamw", "learning_rate": 1e-2},
            "lr_scheduler": "constant",
            "strategy": "single",
            "train": {
                "max_steps": 6,
                "global_batch_size": 4,
                "per_device_train_batch_size": 2,
                "bf16": False,
            },
        }
        for path, value in changes.items():
            set_path(tree, path.replace("__", "."), value)
        return parse(Recipe, tree)

    return make
