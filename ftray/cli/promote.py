"""`ftray promote` and `ftray rollback`: which version an alias means."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ftray.cli.options import AsJson, RegistryRoot, takes

if TYPE_CHECKING:
    from ftray.registry.entry import Entry
    from ftray.registry.registry import Registry


@dataclass(frozen=True)
class Move:
    """Which alias, and where."""

    alias: Annotated[str, typer.Option(help="The alias to move.")] = "prod"
    registry: RegistryRoot = "registry"
    as_json: AsJson = False

    def run(self, name: str, to: "Callable[[Registry, str], Entry]") -> None:
        """Move the alias of a name, and say from where to where."""
        import json

        from ftray.registry.registry import Registry

        store = Registry(self.registry)
        before = store.aliases(name).get(self.alias)
        entry = to(store, self.alias)
        if self.as_json:
            typer.echo(json.dumps(entry.to_json()))
            return
        was = "it was new" if before is None else f"it was {name}@{before}"
        typer.echo(f"{name}@{self.alias} is now {entry.ref} ({entry.digest}); {was}")


@takes(Move)
def promote(
    ref: Annotated[str, typer.Argument(help="`name`, `name@3` or `name@alias`: what to promote.")],
    move: Move,
) -> None:
    """Point an alias at a published version; endpoints that serve `name@alias` follow."""
    from ftray.registry.ref import parse_ref

    move.run(parse_ref(ref).name, lambda registry, alias: registry.promote(ref, alias))


@takes(Move)
def rollback(
    name: Annotated[str, typer.Argument(help="Name of the delta.")],
    move: Move,
) -> None:
    """Point an alias at what it pointed at before its last promotion; again for one further back."""
    move.run(name, lambda registry, alias: registry.rollback(name, alias))
