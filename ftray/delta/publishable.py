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

_Tensors = Mapping[str, Mapping[str, Any]]
"""Headers of the files of weights."""


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
    """Check a delta whose digests are verified, with its certificate.

    Raises:
        DeltaError: one line naming the file, tensor or setting.
    """
    check_safe(folder, delta, caps)
    if delta.parity is not None:
        check_parity(delta.parity, delta.digest)
    elif delta.kind in _MEASURED:
        raise DeltaError(
            f"{folder}: this kind of adapter has to be merged to be served; publish it with `--base` so that the"
            " answers are compared, or train a plain LoRA"
        )


def check_safe(folder: Path, delta: Delta, caps: Caps | None = None) -> None:
    """Check what may be known without loading anything.

    Raises:
        DeltaError: as `check_publishable`.
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


def _check_low_rank(folder: Path, tensors: _Tensors, caps: Caps) -> None:
    saved = _settings(folder).get("modules_to_save")
    if saved:
        raise DeltaError(
            f"{folder / CONFIG}: modules_to_save={saved} replaces modules of the base, which tenants share; train"
            " without it, or publish the adapter with its base to have it merged"
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


def _check_replacement(folder: Path, tensors: _Tensors, caps: Caps) -> None:
    del tensors, caps
    try:
        check_folder(folder)
    except ModelError as error:
        raise DeltaError(str(error)) from None
    for name in read_json(folder / "config.json", DeltaError).get("architectures") or ():
        if str(name).endswith("ForSequenceClassification"):
            raise DeltaError(f"{folder}: {name} scores texts and is no language model; it cannot be served")


def _check_peft(folder: Path, tensors: _Tensors, caps: Caps) -> None:
    settings = _settings(folder)
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise DeltaError(f"{folder / CONFIG}: task_type {settings['task_type']} is no language model's")
    for field in ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules"):
        # PEFT takes a text for a regular expression, and one can be made to run for ever.
        if isinstance(settings.get(field), str) and settings[field] != "all-linear":
            raise DeltaError(
                f"{folder / CONFIG}: {field} is a pattern; save the adapter with a list of names"
            )
    if settings.get("megatron_config"):
        raise DeltaError(f"{folder / CONFIG}: megatron_config asks for code to be imported; remove it")
    for side in ("lora_A", "lora_B", "hada_w1_a", "lokr_w1", "oft_R"):
        for key, info in tensors[WEIGHTS].items():
            if f".{side}" in key and min(info["shape"]) > caps.max_rank:
                raise DeltaError(f"{folder / WEIGHTS}: `{key}` has a rank above {caps.max_rank}; truncate it")


_KINDS: dict[str, Callable[[Path, _Tensors, Caps], None]] = {
    "low_rank": _check_low_rank,
    "replacement": _check_replacement,
    "peft": _check_peft,
}


_MEASURED = frozenset({"peft"})
"""Kinds that are published with a certificate only: nothing else says that PEFT merges them right."""


def _settings(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / CONFIG, DeltaError)
    if not isinstance(settings, dict):
        raise DeltaError(f"{folder / CONFIG}: holds no settings; save the adapter again with `peft`")
    return settings


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
