"""Where a base model is: a local folder or a Hub id, checked before anything is built."""

from pathlib import Path
from typing import Any

from ftray.core.errors import ModelError
from ftray.core.fs import read_json

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def resolve_folder(name_or_path: str) -> Path:
    """The local folder of a base model; a Hub id is fetched into the Hugging Face cache once.

    Raises:
        ModelError: if it is neither a model folder nor a Hub id that can be had.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return folder.resolve()
    if folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") != 1:
        raise ModelError(f"{name_or_path!r} is not a folder; check the path of the base model")
    return _from_hub(name_or_path)


def _from_hub(repo_id: str) -> Path:
    """The snapshot in the Hugging Face cache; one process of a node fetches a file, the others wait."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
    # The same weights in another layout (`consolidated.safetensors`, folders) would double the download.
    others = ["consolidated*", "*/*"]
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=others))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{repo_id!r} is no folder here and not to be had from the Hub ({reason}); check the base model's name"
        ) from None
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raise `ModelError` unless the folder holds a configuration and safetensors weights."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: not a model folder, config.json is missing; name a Hugging Face folder")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ModelError(
            f"{folder}: no model.safetensors; save the model with `save_pretrained` (safetensors)"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for name in sorted(set(read_json(index)["weight_map"].values())):
            if not (folder / name).is_file():
                raise ModelError(
                    f"{folder / name}: missing, though the index names it; fetch the model again"
                )
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise ModelError(
            f"{folder}/config.json: `auto_map` asks for remote code, which is never run; remove it"
        )
    if "model_type" not in config:
        raise ModelError(f"{folder}/config.json: `model_type` is missing; this is not a transformers model")


def weight_map(folder: Path) -> dict[str, Path]:
    """Checkpoint key -> safetensors file that holds it."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {key: folder / name for key, name in read_json(index)["weight_map"].items()}
    file = folder / "model.safetensors"
    try:
        with safe_open(file, "pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    except SafetensorError as error:
        raise ModelError(f"{file}: not readable as safetensors ({error}); save or fetch it again") from None


def load_config(folder: Path, overrides: dict[str, Any] | None = None) -> Any:
    """The model's transformers configuration."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **(overrides or {}))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}/config.json: {' '.join(str(error).split())[:200]}") from None
