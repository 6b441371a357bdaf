"""`ftray check`."""

from typing import Annotated

import typer


def command(
    recipe: Annotated[str, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as `section.field=value`.")] = None,
) -> None:
    """Check a recipe before any hardware is taken: every field, file, row shape and target."""
    from ftray.cli.screen import out
    from ftray.config.load import load
    from ftray.config.recipe import Recipe
    from ftray.train.check import check_recipe

    for line in check_recipe(load(Recipe, recipe, overrides or [])):
        out.print(line, highlight=False, soft_wrap=True)
    out.print("ok", highlight=False)
