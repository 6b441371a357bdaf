"""`ftray quickstart`: raw text to a live two-tenant endpoint, each stage by the public code a real job uses."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    examples: Annotated[Path, typer.Option(help="Folder of the YAML files.")] = Path("examples/quickstart"),
    keep_serving: Annotated[bool, typer.Option(help="Leave the endpoint up until Ctrl-C.")] = False,
) -> None:
    """Raw text to a live two-tenant endpoint, on this machine."""
    from ftray.cli.tour import Tour
    from ftray.core.errors import ConfigError

    if not (examples / "base.yaml").is_file():
        raise ConfigError(
            f"--examples: {examples}/base.yaml is not there; run in a clone of ftray, or name it"
        )
    Tour(examples).run(keep_serving)
