"""What a delta must be to be published, beyond what its digests say: readable, bounded, finite, of a kind we serve.

Whoever sends a delta is not trusted, so nothing is loaded that could run code, and no size is believed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.adapt.peft_files import CONFIG, PREFIX, WEIGHTS, read_config
from ftray.core.errors import DeltaError, ModelError
from ftray.core.fs import read_json
from ftray.delta import files as delta_files
from ftray.delta.manifest import Delta
from ftray.delta.parity import check_parity
from ftray.model.folder import check_folder


@dataclass(frozen=True)
class Caps:
    """Bounds of a delta."""

    max_rank: int = 1024
    """Of low-rank factors."""
    max_tensors: int = 200_000
    """In all its files."""
    max_json_bytes: int = 64 << 20
    """Of a file of settings; tokenizers have tens of MiB."""


def check_publishable(folder: Path, delta: Delta, caps: Caps | None = None) -> None:
    """Check a delta whose digests are verified.

    Raises:
        DeltaError: one line naming the file, tensor or setting.
    """
    caps = caps or Caps()
    folder = Path(folder)
    for name in delta.files:
        if name.endswith(".json") and (folder / name).stat().st_size > caps.max_json_bytes:
            raise DeltaError(
                f"{folder / name}: larger than {caps.max_json_bytes >> 20} MiB; these are no settings"
            )
    delta_files.check_contents(folder, list(delta.files))
    tensors = {
        name: delta_files.safetensors_header(folder / name)
        for name in delta.files
        if name.endswith(".safetensors")
    }
    if sum(map(len, tensors.values())) > caps.max_tensors:
        raise DeltaError(f"{folder}: more than {caps.max_tensors} tensors; no model has so many")
    _KINDS[delta.kind](folder, tensors, caps)
    for name in tensors:
        _check_finite(folder / name)
    if delta.parity is not None:
        check_parity(delta.parity, delta.digest)


def _check_low_rank(folder: Path, tensors: Mapping[str, Mapping[str, Any]], caps: Caps) -> None:
    settings = read_json(folder / CONFIG)
    if isinstance(settings, dict) and settings.get("modules_to_save"):
        saved = ", ".join(map(str, settings["modules_to_save"]))
        raise DeltaError(
            f"{folder / CONFIG}: modules_to_save ({saved}) replaces whole modules of the base, which tenants share;"
            " train without it, or fully"
        )
    config = read_config(folder)
    ranks, stacked = config.ranks(), bool(config.target_parameters)
    if max(ranks) > caps.max_rank:
        raise DeltaError(f"{folder / CONFIG}: rank {max(ranks)} is more than {caps.max_rank}; truncate it")
    pairs: dict[str, dict[str, list[int]]] = {}
    for key, info in tensors[WEIGHTS].items():
        if key == "__metadata__":
            continue
        layer, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if side not in ("lora_A", "lora_B") or len(info["shape"]) != 2:
            raise DeltaError(f"{folder / WEIGHTS}: `{key}` is no LoRA factor; only plain LoRA is served")
        pairs.setdefault(layer, {})[side] = info["shape"]
    for layer, pair in pairs.items():
        if len(pair) != 2:
            raise DeltaError(f"{folder / WEIGHTS}: `{layer}` has one factor only; save the adapter again")
        (rank, _), (_, columns) = pair["lora_A"], pair["lora_B"]
        if rank != columns or not any(rank == r or (stacked and rank % r == 0 and rank) for r in ranks):
            raise DeltaError(
                f"{folder / WEIGHTS}: `{layer}` has factors {pair['lora_A']} and {pair['lora_B']}, {CONFIG} says"
                f" rank {sorted(ranks)}; save the adapter again"
            )
    if not pairs:
        raise DeltaError(f"{folder / WEIGHTS}: holds no tensors; save the adapter again")


def _check_replacement(folder: Path, tensors: Mapping[str, Mapping[str, Any]], caps: Caps) -> None:
    del tensors, caps
    try:
        check_folder(folder)
    except ModelError as error:
        raise DeltaError(str(error)) from None
    for name in read_json(folder / "config.json").get("architectures") or ():
        if str(name).endswith("ForSequenceClassification"):
            raise DeltaError(f"{folder}: {name} scores texts and is no language model; it cannot be served")


_KINDS: dict[str, Callable[[Path, Mapping[str, Mapping[str, Any]], Caps], None]] = {
    "low_rank": _check_low_rank,
    "replacement": _check_replacement,
}


def _check_finite(path: Path) -> None:
    """Refuse NaN and infinities, one tensor at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not math.isfinite(float(_peak(tensor))):
                    raise DeltaError(f"{path}: `{name}` holds values that are not finite; train it again")
                del tensor
    except SafetensorError as error:
        raise DeltaError(f"{path}: not readable as safetensors ({error}); save it again") from None


def _peak(tensor: Any) -> Any:
    if not tensor.numel():
        return 0.0
    # Eight-bit floats have no `isfinite`; minimum and maximum need no second tensor, and carry a NaN.
    low, high = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    return high if not math.isfinite(float(high)) else low
