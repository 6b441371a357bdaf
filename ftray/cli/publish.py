"""`ftray publish`."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ftray.cli.promote import RegistryRoot


def command(
    folder: Annotated[
        Path,
        typer.Argument(help="A delta folder, the run directory that holds `delta/`, or a PEFT adapter."),
    ],
    name: Annotated[str, typer.Argument(help="Name to publish it under.")],
    registry: RegistryRoot = "registry",
    base: Annotated[
        str, typer.Option(help="Folder or Hub id of its base; needed for an adapter saved by plain PEFT.")
    ] = "",
    alias: Annotated[list[str] | None, typer.Option(help="Alias to point at it; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put a delta into the registry as the next version of a name."""
    import json

    from ftray.delta.manifest import MANIFEST
    from ftray.registry.registry import Registry

    if not (folder / MANIFEST).is_file() and (folder / "delta" / MANIFEST).is_file():
        folder = folder / "delta"
    with _as_delta(folder, base) as delta:
        entry = Registry(registry).publish(delta, name, aliases=alias or [])
    if as_json:
        typer.echo(json.dumps(entry.to_json()))
        return
    aliases = "".join(f", {name}@{word}" for word in entry.aliases)
    typer.echo(f"published {entry.ref}{aliases} ({entry.digest}) at {entry.path}")


@contextlib.contextmanager
def _as_delta(folder: Path, base: str) -> Iterator[Path]:
    """The folder itself if it is a delta, else a copy of the PEFT adapter in it that has a manifest."""
    from ftray.core.errors import DeltaError
    from ftray.delta import manifest

    if (folder / manifest.MANIFEST).is_file():
        if base:
            from ftray.model.identity import base_identity

            manifest.check_base(manifest.read(folder, verify=False), base_identity(base))
        yield folder
        return
    if not (folder / "adapter_config.json").is_file():
        yield folder  # refused by the registry, which says what a delta is
        return
    if not base:
        raise DeltaError(f"{folder}: a PEFT adapter does not say its base exactly; name it: --base FOLDER")
    from ftray.delta.adopt import adopt

    with tempfile.TemporaryDirectory(prefix="ftray-publish-") as tmp:
        if left := adopt(folder, base, Path(tmp)):
            typer.echo(f"note: not published, a delta holds plain files only: {', '.join(left)}", err=True)
        yield Path(tmp)
