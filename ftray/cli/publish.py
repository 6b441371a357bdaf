"""`ftray publish`."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftray.cli.options import AsJson, RegistryRoot

if TYPE_CHECKING:
    from ftray.registry.entry import Entry

MEASURING = "compare alone, merged and served"
Parity = Annotated[
    bool,
    typer.Option(
        help="Publish only what answers alike alone, merged and served; measured where its base is known."
    ),
]


def command(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A delta folder, the run directory that holds `delta/`, a PEFT adapter, or a zip of one."
        ),
    ],
    name: Annotated[str, typer.Argument(help="Name to publish it under.")],
    registry: RegistryRoot = "registry",
    base: Annotated[
        str,
        typer.Option(
            help="Folder or Hub id of its base, if its recipe's is not here; needed for plain PEFT adapters."
        ),
    ] = "",
    alias: Annotated[list[str] | None, typer.Option(help="Alias to point at it; may be repeated.")] = None,
    parity: Parity = True,
    engine: Annotated[
        str, typer.Option(help="Engine that serves it for that, as in a serve file.")
    ] = "torch",
    as_json: AsJson = False,
) -> None:
    """Put a delta into the registry as the next version of a name."""
    from ftray.cli.screen import bar
    from ftray.config.load import parse_yaml
    from ftray.core.spec import build_piece
    from ftray.delta.manifest import MANIFEST
    from ftray.eval.publish import publish
    from ftray.registry.ref import check_name
    from ftray.registry.registry import Registry

    check_name(name)
    with _unpacked(folder) as found:
        if not (found / MANIFEST).is_file() and (found / "delta" / MANIFEST).is_file():
            found = found / "delta"
        with _as_delta(found, base) as delta:
            serving = build_piece("engine", parse_yaml(engine, "--engine"))
            with bar(MEASURING):
                entry = publish(
                    Registry(registry),
                    delta,
                    name,
                    base=base,
                    engine=serving,
                    parity=parity,
                    aliases=alias or [],
                )
    if as_json:
        import json

        typer.echo(json.dumps(entry.to_json()))
        return
    for line in published_lines(entry):
        typer.echo(line)


def published_lines(entry: "Entry") -> list[str]:
    """What was published, and whether it was measured."""
    aliases = "".join(f", {entry.name}@{word}" for word in entry.aliases)
    parity = entry.delta.parity
    if parity is None:
        measured = "not compared alone, merged and served (its base is not known here, or --no-parity)"
    else:
        worst = max(parity.merged_difference, parity.served_difference)
        measured = f"answers alike alone, merged and served by {parity.engine}: within {worst:.1e}"
    return [f"published {entry.ref}{aliases} ({entry.digest}) at {entry.path}", measured]


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The folder itself, or what is in an archive."""
    if not path.is_file():
        yield path
        return
    from ftray.delta.unpack import unpack

    with tempfile.TemporaryDirectory(prefix="ftray-upload-") as tmp:
        yield unpack(path, Path(tmp))


@contextlib.contextmanager
def _as_delta(folder: Path, base: str) -> Iterator[Path]:
    """The folder itself if it is a delta, else a copy of the PEFT adapter in it that has a manifest."""
    from ftray.core.errors import DeltaError
    from ftray.delta.manifest import MANIFEST

    # What is neither is refused by whoever reads it, who says what a delta is.
    if (folder / MANIFEST).is_file() or not (folder / "adapter_config.json").is_file():
        yield folder
        return
    if not base:
        raise DeltaError(f"{folder}: a PEFT adapter does not say its base exactly; name it: --base FOLDER")
    from ftray.delta.adopt import adopt

    with tempfile.TemporaryDirectory(prefix="ftray-publish-") as tmp:
        if left := adopt(folder, base, Path(tmp)):
            typer.echo(f"note: not published, a delta holds plain files only: {', '.join(left)}", err=True)
        yield Path(tmp)
