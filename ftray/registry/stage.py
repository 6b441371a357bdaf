"""A delta copied to where a version of it is made: checked there, so that nobody changes it in between."""

import datetime
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftray.core.errors import DeltaError, RegistryError
from ftray.core.fs import sha256_file, write_json
from ftray.core.spec import dump, parse
from ftray.delta import files as delta_files
from ftray.delta import manifest
from ftray.delta.manifest import Delta
from ftray.delta.parity import Parity
from ftray.delta.publishable import check_publishable
from ftray.registry.shelf import VERSION_FILE

BESIDE = frozenset({VERSION_FILE})
"""What may lie beside a delta's own files."""


def fill(
    staged: Path,
    source: Path,
    name: str,
    metrics: Mapping[str, float],
    lineage: Mapping[str, Any],
    parity: Parity | None,
) -> None:
    """Copy a delta, check the copy, and add measurements, lineage and certificate to its manifest.

    Raises:
        DeltaError: if the source is not a whole, unharmed delta that may be published; names its files.
        RegistryError: if a file is put in another's place meanwhile.
    """
    listed = manifest.read(source, verify=False)
    for file in [manifest.MANIFEST, *listed.files]:
        _copy(source / file, staged / file)
    try:
        delta = manifest.read(staged)
        # What the folder itself says was measured is its maker's word.
        delta = replace(delta, parity=parity)
        check_publishable(staged, delta)
    except DeltaError as error:
        raise DeltaError(str(error).replace(str(staged), str(source))) from None
    merged = dump(delta)
    merged["metrics"] |= dict(metrics)
    merged["lineage"] |= dict(lineage)
    write_json(staged / manifest.MANIFEST, dump(parse(Delta, merged, where=name)))


def write_record(staged: Path, name: str, version: int) -> None:
    """Write what the registry says of a version beside its files."""
    (staged / VERSION_FILE).unlink(missing_ok=True)
    record = {
        "name": name,
        "version": version,
        "published_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "manifest": sha256_file(staged / manifest.MANIFEST),
        "size_bytes": sum(path.stat().st_size for path in staged.rglob("*") if path.is_file()),
    }
    write_json(staged / VERSION_FILE, record)


def check_source(folder: Path) -> None:
    """Refuse a folder that holds what its manifest does not name, before anything of it is copied."""
    delta = manifest.read(folder, verify=False)
    present = set(delta_files.list_files(folder, skip=BESIDE | {manifest.MANIFEST}))
    if unnamed := sorted(present - set(delta.files)):
        raise DeltaError(f"{folder / unnamed[0]}: not named by {manifest.MANIFEST}; remove it")


def _copy(source: Path, target: Path) -> None:
    """Copy a regular file, refusing a link put in its place after the folder was listed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise DeltaError(f"{source}: missing, though the manifest names it; restore it") from None
    with os.fdopen(fd, "rb") as reader, target.open("xb") as writer:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RegistryError(f"{source}: not a plain file")
        shutil.copyfileobj(reader, writer, 1 << 22)
