"""The typed delta: what a fine-tune leaves behind, said in `ftray_delta.json` next to its weights.

The folder itself is an ordinary one (PEFT's layout for low-rank deltas, Hugging Face's for replacement
weights), so other tools load it without ftray; the manifest adds which base it belongs to, how it was made
and the digest of every file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ftray.core.errors import DeltaError, FtrayError
from ftray.core.fs import read_json, sha256_file, sha256_json, verify_tree, write_json
from ftray.core.spec import dump, parse, spec
from ftray.delta import files as delta_files
from ftray.delta.parity import Parity

MANIFEST = "ftray_delta.json"
"""Name of the manifest inside a delta folder."""
FORMAT = 2
"""Newest manifest format this version reads and the one it writes."""

_REQUIRED = {
    "low_rank": ("adapter_config.json", "adapter_model.safetensors"),
    "replacement": ("config.json",),
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
}
_DIGEST_PATTERN = r"^[a-z0-9]+:[0-9a-f]{16,128}$"
_FILE_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@spec
class BaseIdentity:
    """Which base model a delta belongs to."""

    digest: str = Field(pattern=_DIGEST_PATTERN)
    """Digest of the base's weights and configuration; this alone decides whether a base fits."""
    model_type: str = ""
    """Architecture, as in the model's `config.json`."""
    name: str = ""
    """Folder or Hub id the base was loaded from; for people only."""


@spec
class Lineage:
    """Where a delta comes from."""

    data: list[str] = Field(default_factory=list)
    """Digests of the data manifests it was trained on."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Source files of that data -> their digests."""
    parents: list[str] = Field(default_factory=list)
    """References (`name@3`) or digests of the deltas it was made from."""
    run: str = ""
    """Run directory or tracking id of the run that made it."""
    segments: list[dict[str, Any]] = Field(default_factory=list)
    """What a search trained it with, segment by segment: member, checkpoint, configuration, score."""


@spec
class Delta:
    """A change to one base model, with its identity, lineage and the digest of every file."""

    format: int = FORMAT
    """Manifest format."""
    kind: Literal["low_rank", "replacement", "peft"]
    """`low_rank`: LoRA factors in PEFT's layout; `replacement`: whole weights in Hugging Face's layout; `peft`:
    another adapter of PEFT's, which is merged to be served."""
    base: BaseIdentity
    """The base it changes."""
    chat_template_hash: str = ""
    """Hash of the chat template it was trained under; another template means other prompts."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The resolved recipe of the run."""
    lineage: Lineage = Field(default_factory=Lineage)
    """Data, parents and run."""
    derivation: dict[str, Any] = Field(default_factory=dict)
    """How it was computed from its parents, where it was not trained: method, settings, errors by tensor."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Measurements taken on it."""
    parity: Parity | None = None
    """That it answers alike alone, merged and served, if that was measured."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every file of the folder by relative name, the manifest itself left out."""

    @property
    def digest(self) -> str:
        """Identity of what answers: kind, base, chat template and files; not the metrics or the lineage."""
        return sha256_json(
            {
                "kind": self.kind,
                "base": self.base.digest,
                "chat_template_hash": self.chat_template_hash,
                "files": self.files,
            }
        )


def data_lineage(data_manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a data manifest adds to the `Lineage` of what is trained on it."""
    sources = {source["file"]: source["digest"] for source in data_manifest["sources"]}
    return {"data": [data_manifest["digest"]], "sources": sources}


def write(folder: Path | str, **fields: Any) -> Delta:
    """Write the manifest of a folder that holds a delta's files and return it.

    Args:
        folder: the delta folder, its weights already in place.
        **fields: fields of `Delta` but `format` and `files`, which are found here.

    Raises:
        DeltaError: if a field is wrong or the folder holds something a delta may not.
    """
    folder = Path(folder)
    names = delta_files.list_files(folder, skip=frozenset({MANIFEST}))
    digests = {name: sha256_file(folder / name) for name in names}
    delta = _parse({**fields, "format": FORMAT, "files": digests}, folder / MANIFEST)
    _check_complete(delta, folder)
    write_json(folder / MANIFEST, dump(delta))
    return delta


def read(folder: Path | str, verify: bool = True, *, beside: frozenset[str] = frozenset()) -> Delta:
    """Read the manifest of a delta folder.

    Args:
        folder: the delta folder.
        verify: also check that the folder holds the named files, with these digests, and no others.
        beside: names of further files that may lie in the folder.

    Raises:
        DeltaError: one line naming the file that is missing, damaged, not allowed or not named.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise DeltaError(f"{folder}: not a delta ({MANIFEST} is missing); give the `delta` folder of a run")
    data = read_json(path, DeltaError)
    if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
        raise DeltaError(f"{path}: format {data['format']} is newer than {FORMAT}; update ftray to read it")
    delta = _parse(data, path)
    for name, digest in delta.files.items():
        delta_files.check_relative_name(name)
        if not _FILE_DIGEST.fullmatch(digest):
            raise DeltaError(
                f"{path}: the digest of `{name}` is no SHA-256 ({digest[:24]}), which others could forge; make the"
                f" delta again, or remove {MANIFEST} and publish the folder with `--base`"
            )
    if verify:
        _check_complete(delta, folder)
        present = delta_files.list_files(folder, skip=beside | {MANIFEST})
        if unnamed := sorted(set(present) - set(delta.files)):
            raise DeltaError(f"{folder / unnamed[0]}: not named by {MANIFEST}; remove it")
        verify_tree(folder, delta.files, error=DeltaError)
    return delta


def check_base(delta: Delta, base_identity: dict[str, Any]) -> None:
    """Check that a delta belongs to a base.

    Args:
        delta: the delta.
        base_identity: what `ftray.model.identity.base_identity` says of the base folder.

    Raises:
        DeltaError: one line naming both bases.
    """
    if delta.base.digest != base_identity["digest"]:
        other = base_identity.get("name") or base_identity.get("model_type", "")
        theirs = f"{delta.base.name or delta.base.model_type} ({delta.base.digest})"
        ours = f"{other} ({base_identity['digest']})"
        raise DeltaError(f"this delta belongs to base {theirs}, not to {ours}; use it with its own base")


def _parse(data: Any, path: Path) -> Delta:
    try:
        return parse(Delta, data, where=str(path))
    except FtrayError as error:
        raise DeltaError(str(error)) from None


def _check_complete(delta: Delta, folder: Path) -> None:
    for name in _REQUIRED[delta.kind]:
        if name not in delta.files:
            raise DeltaError(f"{folder / name}: missing; a {delta.kind} delta needs it")
    if not any(name.endswith(".safetensors") for name in delta.files):
        raise DeltaError(f"{folder}: no `.safetensors` file; a {delta.kind} delta needs its weights")
