"""A PEFT adapter as a delta: checked against its base, copied, with a manifest."""

import shutil
from pathlib import Path
from typing import Any

from ftray.adapt.lora import load_adapter
from ftray.adapt.peft_files import OtherKindError
from ftray.config.recipe import ModelConfig
from ftray.core.errors import DeltaError
from ftray.delta import files as delta_files
from ftray.delta import manifest
from ftray.model.build import build_structure
from ftray.model.folder import check_folder, resolve_folder
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer


def adopt(folder: Path, base: str, into: Path, **fields: Any) -> list[str]:
    """Make a delta folder of an adapter that was saved by `peft`; `folder` is left as it is.

    Links, folders, and files of a type that a delta may not hold (`training_args.bin`, a checkpoint) stay behind.

    Args:
        folder: the adapter, with `adapter_config.json` and `adapter_model.safetensors`.
        base: folder or Hub id of the base it was trained on.
        into: the delta folder to write.
        **fields: of the manifest, such as `recipe` and `lineage`.

    Returns:
        Names of what stayed behind.

    Raises:
        DeltaError: if it is a plain LoRA that does not fit the base. Whether another kind does, is for its
            parity certificate to say.
        ModelError: if the base cannot be read.
    """
    base_folder = resolve_folder(base)
    left = _copy(folder, into)
    # The copy is what gets checked. Names and shapes are enough, so the base's weights stay on the disk.
    structure = build_structure(ModelConfig(model_name_or_path=str(base_folder)))
    kind = "low_rank"
    try:
        load_adapter(structure, "adopted", into)
    except OtherKindError:
        kind = "peft"
    except DeltaError as error:
        raise DeltaError(str(error).replace(str(into), str(folder))) from None
    manifest.write(
        into,
        kind=kind,
        base=base_identity(base_folder),
        chat_template_hash=chat_template_hash(load_tokenizer(base_folder)),
        **fields,
    )
    return left


def adopt_model(folder: Path, base: str, into: Path, **fields: Any) -> list[str]:
    """Make a delta folder of a whole model that was saved by `save_pretrained`, as `adopt` does of an adapter.

    Args:
        folder: the model.
        base: folder or Hub id of the model it was trained from.
        into: the delta folder to write.
        **fields: of the manifest, such as `recipe` and `lineage`.

    Returns:
        Names of what stayed behind.

    Raises:
        ModelError: if either is no model folder.
    """
    base_folder = resolve_folder(base)
    check_folder(folder)
    left = _copy(folder, into)
    tokenizer = load_tokenizer(base_folder)
    tokenizer.save_pretrained(into)
    manifest.write(
        into,
        kind="replacement",
        base=base_identity(base_folder),
        chat_template_hash=chat_template_hash(tokenizer),
        **fields,
    )
    return left


def _copy(folder: Path, into: Path) -> list[str]:
    """Copy what a delta may hold; returns the names of the rest."""
    into.mkdir(parents=True, exist_ok=True)
    left = []
    for path in sorted(folder.iterdir()):
        if _may_be_copied(path):
            shutil.copyfile(path, into / path.name)
        else:
            left.append(path.name)
    return left


def _may_be_copied(path: Path) -> bool:
    if path.is_symlink() or not path.is_file() or path.name == manifest.MANIFEST:
        return False
    try:
        delta_files.check_relative_name(path.name)
    except DeltaError:
        return False
    return True
