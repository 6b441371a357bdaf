"""`ftray run`."""

from typing import Annotated

import typer


def command(
    recipe: Annotated[str, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as `section.field=value`.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run of this name.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option(help="With --resume: go on though the rows, the seed or the batch size changed.")
    ] = False,
    profile: Annotated[
        bool, typer.Option(help="Write a torch trace of three steps of every rank; name the slowest of them.")
    ] = False,
) -> None:
    """Train one recipe."""
    from ftray.cli.screen import out, run_bars
    from ftray.config.load import load
    from ftray.config.recipe import Recipe
    from ftray.core.spec import replace
    from ftray.data.read import counts_line

    spec = load(Recipe, recipe, overrides or [])
    if profile and spec.train.profile_steps is None:
        spec = replace(spec, "train.profile_steps", 3)
    from ftray.train.ray_launch import (
        launch,
    )  # after the recipe: a mistake in it is told without waiting for Ray

    with run_bars(spec.name) as (on_prepare, on_record):
        result = launch(
            spec,
            resume=resume,
            accept_changed_data=accept_changed_data,
            on_record=on_record,
            on_prepare=on_prepare,
        )
    if spec.train.profile_steps is not None:
        from ftray.train.profile import summarise

        for line in summarise(result.run_dir):
            out.print(line, highlight=False, soft_wrap=True)
    out.print(f"data: {counts_line(result.rows)}", highlight=False, soft_wrap=True)
    shown = "  ".join(f"{key} {value:.4f}" for key, value in result.metrics.items())
    # A trainer that is not ours does not say how many tokens it has seen.
    tokens = f", {result.tokens:,} tokens" if spec.trainer is None else ""
    out.print(f"{spec.name}: {result.step} steps{tokens}  {shown}", highlight=False, soft_wrap=True)
    out.print(f"delta: {result.delta}", highlight=False, soft_wrap=True)
