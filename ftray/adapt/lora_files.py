"""LoRA adapters to and from PEFT's folders."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftray.adapt.lora_experts import (
    ExpertFactors,
    add_factors,
    can_adapt,
    expert_factors,
    from_peft,
    peft_names,
    to_peft,
)
from ftray.adapt.lora_linear import Factors, LoRALinear, adaptable, lora_layers, route_of, scaling_of
from ftray.adapt.peft_files import CONFIG, PREFIX, WEIGHTS, AdapterConfig, read_config, read_factors
from ftray.core.errors import DeltaError
from ftray.core.fs import write_json
from ftray.model.score import HEAD, score_head, task_type
from ftray.model.select import expert_stacks


def save_adapter(
    model: Any,
    name: str,
    folder: Path,
    base_name: str,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    whole: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write one named adapter as `adapter_config.json` + `adapter_model.safetensors` (plain PEFT loads it).

    `whole` has the factors by their names in the model where the model's own may be parts of them. A score head is
    saved with the adapter, as PEFT saves one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = whole or {}
    layers = {key: layer for key, layer in lora_layers(model).items() if name in layer.scaling}
    linear = {key: layer for key, layer in layers.items() if isinstance(layer, LoRALinear)}
    stacks = {key: layer for key, layer in expert_factors(model).items() if name in layer.scaling}
    places = {id(stacks[key]): place for key, place in peft_names(model, list(stacks)).items()}
    tensors = {}
    for key, layer in layers.items():
        sides = {"lora_A": layer.lora_A[name], "lora_B": layer.lora_B[name]}
        a, b = (whole.get(f"{key}.{side}.{name}", factor).detach() for side, factor in sides.items())
        if isinstance(layer, ExpertFactors):
            a, b = to_peft(a, b)
        place = places.get(id(layer), key)
        tensors[f"{PREFIX}{place}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{place}.lora_B.weight"] = b.contiguous()
    head = score_head(model)
    if head is not None:
        weight = whole.get(f"{HEAD}.weight", head.weight)
        tensors[f"{PREFIX}{HEAD}.weight"] = weight.detach().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": _short_names(model, linear),
        "fan_in_fan_out": any(layer.transposed for layer in linear.values()),
        "bias": "none",
        "inference_mode": True,
    }
    config |= {"target_parameters": sorted(stacks)} if stacks else {}
    config |= {"modules_to_save": [HEAD]} if head is not None else {}
    write_json(folder / CONFIG, config)


def _short_names(model: Any, layers: Mapping[str, LoRALinear]) -> list[str]:
    """Last parts of the layers' names where they mean these layers only, else whole names."""
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    meant = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | LoRALinear) and name.rpartition(".")[2] in leaves
    ]
    # To PEFT, short names in a mixture of experts may mean the experts, as they were called in older releases.
    return leaves if len(meant) == len(layers) and not expert_stacks(model) else sorted(layers)


def load_adapter(model: Any, name: str, folder: Path) -> None:
    """Load a LoRA folder in PEFT's format as adapter `name`; layers are made adaptable as needed.

    Raises:
        DeltaError: one line, if the folder is not such an adapter, uses a variant that is not plain LoRA, or
            does not fit this base.
    """
    config = read_config(folder)
    factors = read_factors(folder)
    route = route_of(model)
    stacks = _stack_places(model, config)
    plan = {}
    for place, pair in factors.items():
        stack = stacks.get(place)
        shape = _stack_shape(model, stack) if stack else _linear_shape(model, folder, place)
        plan[place] = _checked_pair(folder, place, pair, shape, config.ranks())
    unload_adapter(model, name)
    for place, (a, b) in plan.items():
        stack = stacks.get(place)
        target: Factors = add_factors(model, stack, route) if stack else adaptable(model, place, route)
        r = a.shape[-2]
        target.add(name, r, scaling_of(r, config.lora_alpha, config.use_rslora))
        with torch.no_grad():
            target.lora_A[name].copy_(a)
            target.lora_B[name].copy_(b)
        target.lora_A[name].requires_grad_(False)
        target.lora_B[name].requires_grad_(False)


def unload_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter `name` from every layer."""
    for layer in lora_layers(model).values():
        layer.remove(name)


def _stack_places(model: Any, config: AdapterConfig) -> dict[str, str]:
    """PEFT's name of the layer -> parameter, for the stacks of experts that an adapter targets."""
    wanted = [
        name
        for name in expert_stacks(model)
        if can_adapt(model, name)
        and any(name == target or name.endswith("." + target) for target in config.target_parameters or [])
    ]
    return {place: name for name, place in peft_names(model, wanted).items()}


Shape = tuple[int, int, int]
"""Matrices (0: one that is no stack), rows, columns."""


def _stack_shape(model: Any, name: str) -> Shape:
    owner, _, leaf = name.rpartition(".")
    experts = model.get_submodule(owner)
    num_experts, first, second = getattr(experts, leaf).shape
    return (num_experts, second, first) if experts.is_transposed else (num_experts, first, second)


def _linear_shape(model: Any, folder: Path, layer: str) -> Shape:
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | Conv1D | LoRALinear):
        raise DeltaError(
            f"{folder}: `{layer}` is no linear layer of this base; the adapter is for another base"
        )
    transposed = isinstance(module, Conv1D) or getattr(module, "transposed", False)
    rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
    return 0, rows, columns


def _checked_pair(
    folder: Path, layer: str, pair: dict[str, torch.Tensor], shape: Shape, ranks: Collection[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    num_experts, out_features, in_features = shape
    if len(pair) != 2:
        raise DeltaError(f"{folder}: `{layer}` has one factor only; save the adapter again")
    a, b = pair["lora_A"], pair["lora_B"]
    rows = a.shape[0]
    if a.shape[1:] != (in_features,) or b.shape != (out_features, rows) or rows % max(1, num_experts):
        stack = f"{num_experts} x " if num_experts else ""
        raise DeltaError(
            f"{folder}: `{layer}` has factors {tuple(a.shape)} and {tuple(b.shape)} where this base has "
            f"{stack}{out_features} x {in_features}; the adapter is for another base"
        )
    if num_experts:
        a, b = from_peft(a, b, num_experts)
    if a.shape[-2] not in ranks:
        raise DeltaError(
            f"{folder}: `{layer}` has rank {a.shape[-2]}, {CONFIG} says {sorted(ranks)}; save the adapter again"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise DeltaError(f"{folder}: `{layer}` holds values that are not finite; train it again")
    return a, b
