"""`ftray publish`."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftray.cli.promote import AsJson, RegistryRoot

if TYPE_CHECKING:
    from ftray.delta.parity import Parity


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
            help="Folder or Hub id of its base; needed for plain PEFT adapters, and for the certificate."
        ),
    ] = "",
    alias: Annotated[list[str] | None, typer.Option(help="Alias to point at it; may be repeated.")] = None,
    parity: Annotated[
        bool, typer.Option(help="With --base: publish only what answers alike alone, merged and served.")
    ] = True,
    engine: Annotated[
        str, typer.Option(help="Engine that serves it for that, as in a serve file.")
    ] = "torch",
    as_json: AsJson = False,
) -> None:
    """Put a delta into the registry as the next version of a name."""
    import json

    from ftray.delta.manifest import MANIFEST
    from ftray.registry.ref import check_name
    from ftray.registry.registry import Registry

    check_name(name)
    with _unpacked(folder) as found:
        if not (found / MANIFEST).is_file() and (found / "delta" / MANIFEST).is_file():
            found = found / "delta"
        with _as_delta(found, base) as delta:
            certificate = _certificate(delta, base, engine) if base and parity else None
            entry = Registry(registry).publish(delta, name, aliases=alias or [], parity=certificate)
    if as_json:
        typer.echo(json.dumps(entry.to_json()))
        return
    aliases = "".join(f", {name}@{word}" for word in entry.aliases)
    typer.echo(f"published {entry.ref}{aliases} ({entry.digest}) at {entry.path}")
    if found_parity := entry.delta.parity:
        worst = max(found_parity.merged_difference, found_parity.served_difference)
        typer.echo(f"answers alike alone, merged and served by {found_parity.engine}: within {worst:.1e}")


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The folder itself, or what is in an archive."""
    if not path.is_file():
        yield path
        return
    from ftray.delta.unpack import unpack

    with tempfile.TemporaryDirectory(prefix="ftray-upload-") as tmp:
        yield unpack(path, Path(tmp))


def _certificate(folder: Path, base: str, engine: str) -> "Parity":
    from ftray.cli.screen import bar
    from ftray.config.load import parse_yaml
    from ftray.core.spec import build_piece
    from ftray.delta import manifest
    from ftray.delta.parity import check_parity
    from ftray.delta.publishable import check_safe
    from ftray.eval.parity import certify
    from ftray.registry.stage import BESIDE

    # Before anything of it is loaded.
    delta = manifest.read(folder, beside=BESIDE)
    check_safe(folder, delta)
    with bar("compare alone, merged and served"):
        certificate = certify(folder, base, build_piece("engine", parse_yaml(engine, "--engine")))
    check_parity(certificate, delta.digest)
    return certificate


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
