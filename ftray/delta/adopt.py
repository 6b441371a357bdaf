"""A plain PEFT adapter as a delta: checked against its base, copied, with a manifest."""

import shutil
from pathlib import Path

from ftray.adapt.lora import load_adapter
from ftray.config.recipe import ModelConfig
from ftray.core.errors import DeltaError
from ftray.delta import files as delta_files
from ftray.delta import manifest
from ftray.model.build import build_structure
from ftray.model.folder import resolve_folder
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer


def adopt(folder: Path, base: str, into: Path) -> list[str]:
    """Make a delta folder of a LoRA that was saved by `peft`; `folder` is left as it is.

    Links, folders, and files of a type that a delta may not hold (`training_args.bin`, a checkpoint) stay behind.

    Args:
        folder: the adapter, with `adapter_config.json` and `adapter_model.safetensors`.
        base: folder or Hub id of the base it was trained on.
        into: the delta folder to write.

    Returns:
        Names of what stayed behind.

    Raises:
        DeltaError: if it is no plain LoRA or does not fit the base.
        ModelError: if the base cannot be read.
    """
    base_folder = resolve_folder(base)
    into.mkdir(parents=True, exist_ok=True)
    left = []
    for path in sorted(folder.iterdir()):
        if _may_be_copied(path):
            shutil.copyfile(path, into / path.name)
        else:
            left.append(path.name)
    # The copy is what gets checked. Names and shapes are enough, so the base's weights stay on the disk.
    structure = build_structure(ModelConfig(model_name_or_path=str(base_folder)))
    try:
        load_adapter(structure, "adopted", into)
    except DeltaError as error:
        raise DeltaError(str(error).replace(str(into), str(folder))) from None
    manifest.write(
        into,
        kind="low_rank",
        base=base_identity(base_folder),
        chat_template_hash=chat_template_hash(load_tokenizer(base_folder)),
    )
    return left


def _may_be_copied(path: Path) -> bool:
    if path.is_symlink() or not path.is_file() or path.name == manifest.MANIFEST:
        return False
    try:
        delta_files.check_relative_name(path.name)
    except DeltaError:
        return False
    return True
