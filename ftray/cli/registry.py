"""`ftray registry`: pins, history and garbage collection."""

from typing import Annotated

import typer

from ftray.cli.options import AsJson, RegistryRoot

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after a registry.")
Ref = Annotated[str, typer.Argument(help="`name`, `name@3` or `name@alias`.")]


@app.command()
def gc(
    registry: RegistryRoot = "registry",
    keep: Annotated[int, typer.Option(help="Newest versions of each name that stay.")] = 3,
    min_age_days: Annotated[float, typer.Option(help="Younger versions stay.")] = 7.0,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; else they are only named.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove versions that no alias, rollback, pin or child needs; without --delete say which."""
    import dataclasses
    import json

    from ftray.registry.gc import collect
    from ftray.registry.registry import Registry

    done = collect(Registry(registry), delete=delete, keep=keep, min_age_s=min_age_days * 86400)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done) | {"deleted": delete}))
        return
    for ref, reason in done.kept.items():
        typer.echo(f"keep    {ref}  ({reason})")
    for ref in done.removed:
        typer.echo(f"remove  {ref}")
    what = "removed" if delete else "to remove with --delete"
    typer.echo(f"{len(done.removed)} versions {what}, {done.freed_bytes / 2**20:.1f} MiB")


@app.command()
def pin(
    ref: Ref,
    reason: Annotated[str, typer.Option(help="Why, for people.")] = "",
    registry: RegistryRoot = "registry",
) -> None:
    """Keep a version from garbage collection."""
    from ftray.registry.registry import Registry

    typer.echo(f"{Registry(registry).pin(ref, reason).ref} is pinned")


@app.command()
def unpin(ref: Ref, registry: RegistryRoot = "registry") -> None:
    """Let go of a pinned version."""
    from ftray.registry.registry import Registry

    typer.echo(f"{Registry(registry).unpin(ref).ref} is not pinned")


@app.command()
def history(
    name: Annotated[str, typer.Argument(help="Name of the delta.")],
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Say what was promoted, rolled back and pinned, and when."""
    import json

    from ftray.core.spec import dump
    from ftray.registry.registry import Registry

    states = Registry(registry).history(name)
    if as_json:
        typer.echo(json.dumps([dump(state) for state in states]))
        return
    for state in states:
        typer.echo(f"{state.at}  {state.change}")
