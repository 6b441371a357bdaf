"""Whether a delta belongs to a base."""

from pathlib import Path
from typing import Any

from ftray.adapt.peft_files import CONFIG, WEIGHTS
from ftray.core.errors import DeltaError
from ftray.core.fs import sha256_file, sha256_json
from ftray.delta import manifest
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash
from ftray.registry.shelf import VERSION_FILE


class DeltaGate:
    """Refuses what does not belong to a base: another base's or chat template's delta, damaged files."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.identity = base_identity(folder)
        self.template_hash = chat_template_hash(tokenizer)

    def check(self, folder: Path) -> manifest.Delta | None:
        """The manifest of a delta folder; one without is a plain PEFT adapter, checked by its shapes alone.

        Raises:
            DeltaError: one line.
        """
        if not (folder / manifest.MANIFEST).is_file():
            return None
        delta = manifest.read(folder, beside=frozenset({VERSION_FILE}))
        try:
            manifest.check_base(delta, self.identity)
        except DeltaError as error:
            raise DeltaError(f"{folder}: {error}") from None
        if delta.chat_template_hash and delta.chat_template_hash != self.template_hash:
            raise DeltaError(
                f"{folder}: trained under chat template {delta.chat_template_hash}, this base has"
                f" {self.template_hash}; serve it with the tokenizer it was trained with"
            )
        return delta


def folder_digest(folder: Path) -> str:
    """Identity of a plain PEFT folder, which has no manifest to name it. Raises `DeltaError` if it is none."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise DeltaError(f"{folder}: {name} is missing; name a PEFT adapter folder")
    return sha256_json({name: sha256_file(folder / name) for name in (CONFIG, WEIGHTS)})
