"""`ftray promote` and `ftray rollback`: which version an alias means."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftray.registry.entry import Entry

RegistryRoot = Annotated[
    str, typer.Option(help="Folder of the registry, or a URL such as s3://bucket/registry.")
]
Alias = Annotated[str, typer.Option(help="The alias to move.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def promote(
    ref: Annotated[str, typer.Argument(help="`name`, `name@3` or `name@alias`: what to promote.")],
    alias: Alias = "prod",
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Point an alias at a published version; endpoints that serve `name@alias` follow."""
    from ftray.registry.registry import Registry

    store = Registry(registry)
    before = store.aliases(store.show(ref).name).get(alias)
    _say(store.promote(ref, alias), alias, before, as_json)


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the delta.")],
    alias: Alias = "prod",
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Point an alias at what it pointed at before its last promotion; again for one further back."""
    from ftray.registry.registry import Registry

    store = Registry(registry)
    before = store.aliases(name).get(alias)
    _say(store.rollback(name, alias), alias, before, as_json)


def _say(entry: "Entry", alias: str, before: int | None, as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps(entry.to_json()))
        return
    was = "it was new" if before is None else f"it was {entry.name}@{before}"
    typer.echo(f"{entry.name}@{alias} is now {entry.ref} ({entry.digest}); {was}")
