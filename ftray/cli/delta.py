"""`ftray delta`: deltas calculated from deltas, offline."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftray.cli.promote import AsJson, RegistryRoot

if TYPE_CHECKING:
    from ftray.delta.algebra import Kind, Parent

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Calculate with deltas of one base.")

One = Annotated[str, typer.Argument(help="A delta folder, or `name@3` of the registry.")]
Some = Annotated[list[str], typer.Argument(help="Delta folders, or `name@3` of the registry.")]
Base = Annotated[str, typer.Option(help="Folder or Hub id of their base.")]
Out = Annotated[Path, typer.Option(help="The folder to write; must be new.")]
Rank = Annotated[
    int | None, typer.Option(help="Hold the result as factors of this rank; the error is recorded.")
]
Dtype = Annotated[str | None, typer.Option(help="Of whole weights: float32 or bfloat16; else the base's.")]
Weights = Annotated[list[float] | None, typer.Option("--weight", help="One for each delta, in their order.")]


@app.command()
def scale(
    delta: One,
    base: Base,
    out: Out,
    factor: Annotated[float, typer.Option(help="1 leaves it as it is, -1 unlearns it.")],
    rank: Rank = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Make a delta stronger or weaker."""
    _derive("scale", {"factor": factor}, [delta], base, out, registry, as_json, rank=rank)


@app.command()
def add(
    deltas: Some,
    base: Base,
    out: Out,
    weight: Weights = None,
    rank: Rank = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Add deltas up, each times its weight; low-rank ones exactly, their ranks add up too."""
    _derive("add", {"coefficients": weight}, deltas, base, out, registry, as_json, rank=rank)


@app.command()
def average(
    deltas: Some,
    base: Base,
    out: Out,
    weight: Weights = None,
    rank: Rank = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Take the mean of deltas."""
    _derive("average", {"coefficients": weight}, deltas, base, out, registry, as_json, rank=rank)


@app.command()
def interpolate(
    deltas: Some,
    base: Base,
    out: Out,
    alpha: Annotated[float, typer.Option(help="0: the base, or the first delta; 1: the last.")] = 0.5,
    rank: Rank = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Take a point between the base and a delta (WiSE-FT), or between two deltas."""
    _derive("interpolate", {"alpha": alpha}, deltas, base, out, registry, as_json, rank=rank)


@app.command()
def ties(
    deltas: Some,
    base: Base,
    out: Out,
    density: Annotated[float, typer.Option(help="Fraction of the largest changes kept.")] = 0.2,
    weight: Weights = None,
    rank: Rank = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Combine deltas without letting them cancel each other (TIES)."""
    settings = {"density": density, "coefficients": weight}
    _derive("ties", settings, deltas, base, out, registry, as_json, rank=rank)


@app.command()
def extract(
    delta: One,
    base: Base,
    out: Out,
    rank: Annotated[int, typer.Option(help="Rank of the factors; the error is recorded.")] = 64,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Find low-rank factors for the difference that replacement weights make."""
    _derive("scale", {}, [delta], base, out, registry, as_json, rank=rank, kind="low_rank")


@app.command()
def merge(
    delta: One,
    base: Base,
    out: Out,
    dtype: Dtype = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Merge a delta into its base: a model folder that plain transformers loads, and a delta itself."""
    _derive("scale", {}, [delta], base, out, registry, as_json, kind="replacement", dtype=dtype)


def _derive(
    method: str,
    settings: dict[str, Any],
    deltas: Sequence[str],
    base: str,
    out: Path,
    registry: str,
    as_json: bool,
    *,
    rank: int | None = None,
    kind: "Kind | None" = None,
    dtype: str | None = None,
) -> None:
    import json

    from ftray.cli.screen import bar
    from ftray.core.spec import build_piece, dump
    from ftray.delta.algebra import derive

    combination = build_piece("combine", {"type": method, **settings})
    parents = [_parent(text, registry) for text in deltas]
    with bar(method) as progress:
        delta = derive(combination, parents, base, out, rank=rank, kind=kind, dtype=dtype, progress=progress)
    if as_json:
        typer.echo(json.dumps({"path": str(out), "digest": delta.digest, **dump(delta)}))
        return
    error = delta.metrics.get("relative_error")
    lost = f"; relative error {error:.3g} (by tensor in {out / 'ftray_delta.json'})" if error else ""
    typer.echo(f"wrote {out}: {delta.kind} {delta.digest}{lost}")


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
