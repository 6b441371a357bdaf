"""A LoRA folder in PEFT's format: its settings, checked, and its tensors."""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load

from ftray.core.errors import DeltaError, FtrayError
from ftray.core.fs import read_json
from ftray.core.spec import parse, spec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before a layer's name."""


@spec
class AdapterConfig:
    """What decides the outputs of a plain LoRA adapter besides its tensors."""

    r: int = Field(ge=1, strict=True)
    """Rank."""
    lora_alpha: float = Field(allow_inf_nan=False, strict=True)
    """Scaling numerator."""
    use_rslora: bool = Field(default=False, strict=True)
    """Scale by `lora_alpha / sqrt(r)`."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    """Layers of another rank; each layer is scaled by its own."""

    target_parameters: list[str] | None = None
    """Stacks of experts it adapts besides linear layers."""

    def ranks(self) -> set[int]:
        """Ranks a layer may have."""
        return {self.r, *(self.rank_pattern or {}).values()}


# How it was made, or where it applies: the names and shapes of the tensors say that themselves. The settings of an
# initialisation act through `init_lora_weights` alone.
_HARMLESS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA start by changing the base's weights; these do not.
_PLAIN: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}


class OtherKindError(DeltaError):
    """An adapter that PEFT may know how to use, but that is no plain LoRA."""


_OFF: tuple[object, ...] = (None, False, [], {}, "")


def read_config(folder: Path) -> AdapterConfig:
    """Settings of the adapter in a folder.

    Every setting that is not known to be harmless must be off, so that a variant of LoRA that PEFT adds later is
    refused rather than answered wrongly.

    Raises:
        DeltaError: one line, if the file is missing or damaged, or the adapter is no plain LoRA.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise DeltaError(f"{folder}: {CONFIG} is missing; name a PEFT adapter folder")
    data = read_json(path, DeltaError)
    if not isinstance(data, dict):
        raise DeltaError(f"{path}: holds no settings; save the adapter again with `peft`")
    if data.get("peft_type") != "LORA":
        raise OtherKindError(f"{folder}: peft_type is {data.get('peft_type')!r}; only LORA shares a base")
    fields = AdapterConfig.__dataclass_fields__
    for key, value in data.items():
        if key not in _HARMLESS and key not in fields and value not in _PLAIN.get(key, _OFF):
            shown = repr(value)[:60]
            raise OtherKindError(f"{folder}: {key}={shown} is not plain LoRA; train without it or merge it")
    try:
        return parse(AdapterConfig, {key: data[key] for key in data if key in fields}, where=str(path))
    except FtrayError as error:
        raise DeltaError(str(error)) from None


def read_factors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Factors of the adapter in a folder: layer -> `lora_A` or `lora_B` -> tensor.

    Raises:
        DeltaError: one line, if the file is missing or damaged, or holds anything else.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise DeltaError(f"{folder}: {WEIGHTS} is missing; pickled adapters are never read")
    try:
        # Not through `safe_open`: 0.8 leaks two integers for every tensor, and an engine reads deltas without end.
        tensors: dict[str, Any] = load(file.read_bytes())
    except (SafetensorError, KeyError) as error:  # KeyError: a type of numbers that torch has not
        raise DeltaError(f"{file}: not readable as safetensors ({error})") from None
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in sorted(tensors.items()):  # as they come, their order is by chance
        layer, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B"):
            raise OtherKindError(f"{folder}: tensor `{key}` is no LoRA factor; only plain LoRA shares a base")
        factors.setdefault(layer, {})[factor] = tensor
    if not factors:
        raise DeltaError(f"{file}: holds no tensors; save the adapter again")
    return factors
