"""LoRA adapters to and from PEFT's folders."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank adapter's tensors, checked against a base and not yet part of a model."""

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """A and B, as `Factors` holds them, by the name of the linear layer or of the stack of experts."""
    stacks: frozenset[str]
    """Which of the names are stacks of experts."""
    lora_alpha: float
    """Scaling numerator."""
    use_rslora: bool
    """Scale by `lora_alpha / sqrt(r)`."""

    def scaling(self, name: str) -> float:
        """What the update of one layer is multiplied by."""
        return scaling_of(self.factors[name][0].shape[-2], self.lora_alpha, self.use_rslora)

    @property
    def size_bytes(self) -> int:
        """Of all factors."""
        return sum(part.nbytes for pair in self.factors.values() for part in pair)


class AdapterSites:
    """Where a base can be adapted, seen once: adapters are then read without a look at the model's modules.

    So one thread may read adapters while another runs the model or puts them into it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._stacks = {
            name: _stack_shape(model, name) for name in expert_stacks(model) if can_adapt(model, name)
        }
        self._linear = {
            name: _linear_shape(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D | LoRALinear)
        }

    def read(self, folder: Path) -> Adapter:
        """Read a LoRA folder in PEFT's format.

        Raises:
            DeltaError: one line, if the folder is not such an adapter, uses a variant that is not plain LoRA, or
                does not fit this base.
        """
        config = read_config(folder)
        places = self._stack_places(config)
        plan = {}
        for place, pair in read_factors(folder).items():
            name = places.get(place, place)
            shape = self._stacks[name] if place in places else self._linear.get(place)
            if shape is None:
                raise DeltaError(
                    f"{folder}: `{place}` is no linear layer of this base; the adapter is for another base"
                )
            plan[name] = _checked_pair(folder, place, pair, shape, config.ranks())
        stacks = frozenset(plan.keys() & places.values())
        return Adapter(plan, stacks, config.lora_alpha, config.use_rslora)

    def _stack_places(self, config: AdapterConfig) -> dict[str, str]:
        """PEFT's name of the layer -> parameter, for the stacks of experts that an adapter targets."""
        targets = config.target_parameters or []
        wanted = [name for name in self._stacks if any(name == t or name.endswith("." + t) for t in targets)]
        return {place: name for name, place in peft_names(self._model, wanted).items()}


def load_adapter(model: Any, name: str, folder: Path) -> None:
    """Load a LoRA folder in PEFT's format as adapter `name`; layers are made adaptable as needed.

    Raises:
        DeltaError: as `AdapterSites.read`.
    """
    put_adapter(model, name, AdapterSites(model).read(folder))


def put_adapter(model: Any, name: str, adapter: Adapter) -> None:
    """Make an adapter that was read part of the model; an earlier one of this name gives way."""
    unload_adapter(model, name)
    route = route_of(model)
    for place, (a, b) in adapter.factors.items():
        stack = place in adapter.stacks
        target: Factors = add_factors(model, place, route) if stack else adaptable(model, place, route)
        target.add(name, a.shape[-2], adapter.scaling(place))
        with torch.no_grad():
            target.lora_A[name].copy_(a)
            target.lora_B[name].copy_(b)
        target.lora_A[name].requires_grad_(False)
        target.lora_B[name].requires_grad_(False)


def unload_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter `name` from every layer."""
    for layer in lora_layers(model).values():
        layer.remove(name)


Shape = tuple[int, int, int]
"""Matrices (0: one that is no stack), rows, columns."""


def _stack_shape(model: Any, name: str) -> Shape:
    owner, _, leaf = name.rpartition(".")
    experts = model.get_submodule(owner)
    num_experts, first, second = getattr(experts, leaf).shape
    return (num_experts, second, first) if experts.is_transposed else (num_experts, first, second)


def _linear_shape(module: nn.Module) -> Shape:
    transposed = isinstance(module, Conv1D) or getattr(module, "transposed", False)
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    return 0, rows, columns


def _checked_pair(
    folder: Path, layer: str, pair: dict[str, torch.Tensor], shape: Shape, ranks: Collection[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    num_experts, out_features, in_features = shape
    if len(pair) != 2:
        raise DeltaError(f"{folder}: `{layer}` has one factor only; save the adapter again")
    a, b = pair["lora_A"], pair["lora_B"]
    for factor in (a, b):
        if not factor.is_floating_point() or factor.itemsize < 2:
            raise DeltaError(
                f"{folder}: `{layer}` has factors of {factor.dtype}; save them as float32, float16 or bfloat16"
            )
    rows = a.shape[0] if a.ndim else 0
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
