"""`ftray check`."""

from typing import Annotated, Any

import typer


def command(
    recipe: Annotated[str, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as `section.field=value`.")] = None,
    equivalence: Annotated[
        bool,
        typer.Option(
            help="Also take 10 steps in several ways (batches, packing, workers, strategies): losses must agree."
        ),
    ] = False,
) -> None:
    """Check a recipe before any hardware is taken: every field, file, row shape and target."""
    from ftray.cli.screen import out
    from ftray.config.load import load
    from ftray.config.recipe import Recipe
    from ftray.train.check import check_recipe

    spec = load(Recipe, recipe, overrides or [])
    for line in check_recipe(spec):
        out.print(line, highlight=False, soft_wrap=True)
    if equivalence:
        _compare(spec)
    out.print("ok", highlight=False)


def _compare(recipe: Any) -> None:
    from ftray.cli.screen import out
    from ftray.train.equivalence import TOLERANCE, compare, table

    found, left_out = compare(recipe)
    for line in table(found, left_out):
        out.print(line, highlight=False, soft_wrap=True)
    odd = [row.name for row in found if not row.relative <= TOLERANCE]
    if odd:
        out.print(f"not equivalent: {'; '.join(odd)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)
