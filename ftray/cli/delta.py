"""`ftray delta`: deltas calculated from deltas, offline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftray.cli.options import AsJson, RegistryRoot, takes

if TYPE_CHECKING:
    from ftray.delta.algebra import Kind, Parent

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Calculate with deltas of one base.")

One = Annotated[str, typer.Argument(help="A delta folder, or `name@3` of the registry.")]
Some = Annotated[list[str], typer.Argument(help="Delta folders, or `name@3` of the registry.")]
Rank = Annotated[
    int | None, typer.Option(help="Hold the result as factors of this rank; the error is recorded.")
]
Dtype = Annotated[str | None, typer.Option(help="Of whole weights: float32 or bfloat16; else the base's.")]
Weights = Annotated[list[float] | None, typer.Option("--weight", help="One for each delta, in their order.")]


@dataclass(frozen=True)
class Calculation:
    """From what and to where; what every verb takes."""

    base: Annotated[str, typer.Option(help="Folder or Hub id of their base.")]
    out: Annotated[Path, typer.Option(help="The folder to write; must be new.")]
    registry: RegistryRoot = "registry"
    as_json: AsJson = False

    def run(
        self,
        method: str,
        deltas: Sequence[str],
        *,
        rank: int | None = None,
        kind: "Kind | None" = None,
        dtype: str | None = None,
        **settings: Any,
    ) -> None:
        """Combine deltas by a method with its settings, and say what came of it."""
        import json

        from ftray.cli.screen import bar
        from ftray.core.spec import build_piece, dump
        from ftray.delta.algebra import derive

        combination = build_piece("combine", {"type": method, **settings})
        parents = [_parent(text, self.registry) for text in deltas]
        wanted: dict[str, Any] = {"rank": rank, "kind": kind, "dtype": dtype}
        with bar(method) as progress:
            delta = derive(combination, parents, self.base, self.out, **wanted, progress=progress)
        if self.as_json:
            typer.echo(json.dumps({"path": str(self.out), "digest": delta.digest, **dump(delta)}))
            return
        error = delta.metrics.get("relative_error")
        lost = f"; relative error {error:.3g} (by tensor in {self.out / 'ftray_delta.json'})" if error else ""
        typer.echo(f"wrote {self.out}: {delta.kind} {delta.digest}{lost}")


@app.command()
@takes(Calculation)
def scale(
    delta: One,
    factor: Annotated[float, typer.Option(help="1 leaves it as it is, -1 unlearns it.")],
    rank: Rank = None,
    *,
    into: Calculation,
) -> None:
    """Make a delta stronger or weaker."""
    into.run("scale", [delta], factor=factor, rank=rank)


@app.command()
@takes(Calculation)
def add(deltas: Some, weight: Weights = None, rank: Rank = None, *, into: Calculation) -> None:
    """Add deltas up, each times its weight; low-rank ones exactly, their ranks add up too."""
    into.run("add", deltas, coefficients=weight, rank=rank)


@app.command()
@takes(Calculation)
def average(deltas: Some, weight: Weights = None, rank: Rank = None, *, into: Calculation) -> None:
    """Take the mean of deltas."""
    into.run("average", deltas, coefficients=weight, rank=rank)


@app.command()
@takes(Calculation)
def interpolate(
    deltas: Some,
    alpha: Annotated[float, typer.Option(help="0: the base, or the first delta; 1: the last.")] = 0.5,
    rank: Rank = None,
    *,
    into: Calculation,
) -> None:
    """Take a point between the base and a delta (WiSE-FT), or between two deltas."""
    into.run("interpolate", deltas, alpha=alpha, rank=rank)


@app.command()
@takes(Calculation)
def ties(
    deltas: Some,
    density: Annotated[float, typer.Option(help="Fraction of the largest changes kept.")] = 0.2,
    weight: Weights = None,
    rank: Rank = None,
    *,
    into: Calculation,
) -> None:
    """Combine deltas without letting them cancel each other (TIES)."""
    into.run("ties", deltas, density=density, coefficients=weight, rank=rank)


@app.command()
@takes(Calculation)
def extract(
    delta: One,
    rank: Annotated[int, typer.Option(help="Rank of the factors; the error is recorded.")] = 64,
    *,
    into: Calculation,
) -> None:
    """Find low-rank factors for the difference that replacement weights make."""
    into.run("scale", [delta], rank=rank, kind="low_rank")


@app.command()
@takes(Calculation)
def merge(delta: One, dtype: Dtype = None, *, into: Calculation) -> None:
    """Merge a delta into its base: a model folder that plain transformers loads, and a delta itself."""
    into.run("scale", [delta], kind="replacement", dtype=dtype)


def _parent(text: str, registry: str) -> "Parent":
    from ftray.delta import manifest
    from ftray.delta.algebra import Parent

    folder = Path(text)
    if (folder / "delta" / manifest.MANIFEST).is_file():
        folder = folder / "delta"
    if (folder / manifest.MANIFEST).is_file() or "/" in text:
        from ftray.registry.shelf import VERSION_FILE

        return Parent(folder, manifest.read(folder, beside=frozenset({VERSION_FILE})))
    from ftray.registry.registry import Registry

    entry = Registry(registry).resolve(text)
    return Parent(entry.path, entry.delta, entry.ref)
