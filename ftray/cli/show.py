"""`ftray show`."""

from typing import TYPE_CHECKING, Annotated

import typer

from ftray.cli.options import RegistryRoot

if TYPE_CHECKING:
    from rich.table import Table

    from ftray.registry.entry import Entry


def command(
    ref: Annotated[str, typer.Argument(help="`name`, `name@3` or `name@alias`.")],
    registry: RegistryRoot = "registry",
    verify: Annotated[bool, typer.Option(help="Check every file against its digest.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a published delta and its lineage."""
    import json

    from rich.console import Console

    from ftray.registry.registry import Registry

    store = Registry(registry)
    entry = store.resolve(ref) if verify else store.show(ref)
    if as_json:
        typer.echo(json.dumps(entry.to_json()))
        return
    console = Console()
    console.print(_table(entry))
    if entry.delta.recipe:
        from ftray.config.load import to_yaml

        console.print("recipe", style="bold")
        console.print(to_yaml(entry.delta.recipe), markup=False, highlight=False)


def _table(entry: "Entry") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    delta = entry.delta
    rows = {
        "delta": entry.ref + "".join(f"  @{alias}" for alias in entry.aliases),
        "digest": entry.digest,
        "kind": delta.kind,
        "base": f"{delta.base.name} ({delta.base.model_type})\n{delta.base.digest}",
        "chat template": delta.chat_template_hash or "none",
        "run": delta.lineage.run or "not recorded",
        "data manifests": "\n".join(delta.lineage.data) or "not recorded",
        "parents": "\n".join(delta.lineage.parents) or "none",
        "metrics": "\n".join(f"{key} {value:.6g}" for key, value in delta.metrics.items()) or "none",
        "files": "\n".join(f"{name}  {digest}" for name, digest in delta.files.items()),
        "published (UTC)": entry.published_at,
        "path": str(entry.path),
    }
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows.items():
        table.add_row(label, escape(text))
    return table
