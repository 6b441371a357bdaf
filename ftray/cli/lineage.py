"""`ftray lineage`: where a delta comes from, what came of it, and which deltas saw a source file."""

from typing import TYPE_CHECKING, Annotated

import typer

from ftray.cli.options import AsJson, RegistryRoot

if TYPE_CHECKING:
    from ftray.registry.lineage import Lineage, Witness


def command(
    ref: Annotated[str, typer.Argument(help="`name`, `name@3` or `name@alias`; nothing with --source.")] = "",
    source: Annotated[
        str, typer.Option(help="A source file: path or the last parts of one, URL, or digest.")
    ] = "",
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Show where a delta comes from and what came of it, or which deltas saw a source file."""
    import json

    from ftray.core.errors import RegistryError
    from ftray.registry.lineage import lineage, saw
    from ftray.registry.registry import Registry

    if bool(ref) == bool(source):
        raise RegistryError("lineage: name a delta, or a file with `--source FILE`, one of the two")
    store = Registry(registry)
    if source:
        witnesses = saw(store, source)
        typer.echo(json.dumps([one.to_json() for one in witnesses]) if as_json else _seen(source, witnesses))
        return
    found = lineage(store, ref)
    typer.echo(json.dumps(found.to_json()) if as_json else _family(found))


def _family(found: "Lineage") -> str:
    delta = found.entry.delta
    lines = [f"{found.entry.ref}  {found.entry.digest}"]
    lines.append(f"base     {delta.base.name} {delta.base.digest}")
    lines.append(f"run      {delta.lineage.run or 'not recorded'}")
    lines.append(
        f"recipe   {delta.recipe.get('name') or 'not recorded'} (all of it: ftray show {found.entry.ref})"
    )
    lines += [f"data     {digest}" for digest in delta.lineage.data] or ["data     not recorded"]
    lines += [f"source   {file}  {digest}" for file, digest in delta.lineage.sources.items()]
    if delta.derivation:
        lines.append(f"made by  {delta.derivation.get('method', '')} {delta.derivation.get('settings', '')}")
    for word, relatives in (("parent", found.ancestors), ("child", found.descendants)):
        for relative in relatives:
            depth = "  " * (relative.steps - 1)
            lines.append(
                f"{word:8} {depth}{relative.ref}{'' if relative.entry else '  (not published here)'}"
            )
    return "\n".join(lines)


def _seen(source: str, witnesses: "list[Witness]") -> str:
    lines = [
        f"{one.entry.ref}  {one.file}{f'  through {one.through}' if one.through else ''}" for one in witnesses
    ]
    return "\n".join(lines) or f"{source}: no delta here was trained on it, as far as is recorded"
