"""The file or files of a search: one that names its recipe, or a recipe and a file of the search's fields."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftray.config.load import apply_override, load, read_yaml
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import parse


def load_search(file: Path, space: Path | None = None, overrides: Sequence[str] = ()) -> TuneConfig:
    """Read a search.

    Args:
        file: of the search; with `space` that of its recipe.
        space: of the search's fields besides its recipe (`space`, `policy`, ...). Unless it says otherwise the
            search is called `<name of the recipe>-search` and kept where the recipe's runs are.
        overrides: `field=value` changes to the search.

    Raises:
        ConfigError: one line, also for a recipe without `space` and a search with it.
    """
    if space is None:
        try:
            return load(TuneConfig, file, overrides)
        except ConfigError:
            if not _has(read_yaml(file), "model"):
                raise
        raise ConfigError(f"{file}: is a recipe; name the file of the search's fields by --space")
    if _has(read_yaml(file), "space"):
        raise ConfigError(f"--space: {file} is a search of its own, no recipe; leave one of the two out")
    found = read_yaml(space)
    if not _has(found, "space"):
        raise ConfigError(f"--space: {space} has no `space`; write the paths to be searched below it")
    if "recipe" in found:
        raise ConfigError(f"--space: {space} names a recipe too; leave `recipe` out, or give this file alone")
    for override in overrides:
        apply_override(found, override)
    recipe = load(Recipe, file, found.get("overrides") or [])
    defaults = {"name": f"{recipe.name}-search", "output_dir": recipe.output_dir}
    return parse(TuneConfig, {**defaults, **found, "recipe": str(file)}, where=str(space))


def _has(settings: Any, field: str) -> bool:
    return isinstance(settings, dict) and field in settings
