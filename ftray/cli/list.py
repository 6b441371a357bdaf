"""`ftray list`."""

from typing import Annotated

import typer

from ftray.cli.options import RegistryRoot


def command(
    registry: RegistryRoot = "registry",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line.")] = False,
) -> None:
    """List what the registry holds."""
    import json

    from rich.console import Console
    from rich.table import Table

    from ftray.registry.registry import Registry

    entries = Registry(registry).list()
    if as_json:
        typer.echo(json.dumps([entry.to_json() for entry in entries]))
        return
    if not entries:
        typer.echo(f"{registry}: nothing is published here; `ftray publish FOLDER NAME` puts a delta in")
        return
    table = Table("delta", "aliases", "kind", "base", "metrics", "published (UTC)")
    for entry in entries:
        metrics = ", ".join(f"{key} {value:.4g}" for key, value in entry.delta.metrics.items())
        base = entry.delta.base.name or entry.delta.base.digest
        published = entry.published_at[:19].replace("T", " ")
        table.add_row(entry.ref, " ".join(entry.aliases), entry.delta.kind, base, metrics, published)
    Console().print(table)
