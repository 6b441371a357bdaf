"""`ftray publish`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="A delta folder, or the run directory that holds `delta/`.")],
    name: Annotated[str, typer.Argument(help="Name to publish it under.")],
    registry: Annotated[Path, typer.Option(help="Folder of the registry.")] = Path("registry"),
    alias: Annotated[list[str] | None, typer.Option(help="Alias to point at it; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put a delta into the registry as the next version of a name."""
    import json

    from ftray.delta.manifest import MANIFEST
    from ftray.registry.local import Registry

    if not (folder / MANIFEST).is_file() and (folder / "delta" / MANIFEST).is_file():
        folder = folder / "delta"
    entry = Registry(registry).publish(folder, name, aliases=alias or [])
    if as_json:
        typer.echo(json.dumps(entry.to_json()))
        return
    aliases = "".join(f", {name}@{word}" for word in entry.aliases)
    typer.echo(f"published {entry.ref}{aliases} ({entry.digest}) at {entry.path}")
