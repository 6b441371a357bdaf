"""`ftray plan`."""

import dataclasses
import json
from typing import Annotated

import typer


def command(
    recipe: Annotated[str, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as `section.field=value`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a run will be: parameters, tokens, steps, checkpoint size, peak memory; nothing is allocated."""
    from ftray.cli.screen import out
    from ftray.config.load import load
    from ftray.config.recipe import Recipe
    from ftray.train.plan import lines_of, plan

    found = plan(load(Recipe, recipe, overrides or []))
    if as_json:
        out.print(json.dumps(dataclasses.asdict(found)), highlight=False, soft_wrap=True)
        return
    for line in lines_of(found):
        out.print(line, highlight=False, soft_wrap=True)
