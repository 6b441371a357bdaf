"""One delta as it takes part in a calculation: the change it makes to each of the base's parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftray.adapt.lora_experts import can_adapt
from ftray.adapt.lora_files import Adapter, AdapterSites, put_adapter, unload_adapter
from ftray.adapt.lora_linear import route_of
from ftray.core.errors import DeltaError
from ftray.delta.factors import Pair
from ftray.delta.peft_source import PeftAdapter
from ftray.model.build import load_model
from ftray.model.convert import Origin, find_origins, read
from ftray.model.folder import weight_map
from ftray.model.select import expert_stacks

_NAME = "delta"


class Source(Protocol):
    """What a delta changes."""

    def change(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        """The change of one parameter in float32, laid out as the parameter is; None if it has none."""
        ...

    def pairs(self) -> Mapping[str, Pair] | None:
        """All it changes, by layer, as scaled factors; None if that is not known."""
        ...

    def attached(self, model: Any) -> Any:
        """A model that answers under the delta alone; `model`, the base in memory, may be it."""
        ...

    def detach(self, model: Any) -> None:
        """Let the base answer as it is again."""
        ...


@dataclass(frozen=True)
class LowRank:
    """Factors, read as a whole: they are small."""

    adapter: Adapter
    layers: Mapping[str, "Layer"]

    def change(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        """The product of the scaled factors."""
        layer = self.layers.get(name)
        if layer is None or layer.place not in self.adapter.factors:
            return None
        a, b = self._pair(layer.place)
        return layer.laid_out(b @ a, weight)

    def pairs(self) -> Mapping[str, Pair]:
        """The factors."""
        return {place: self._pair(place) for place in self.adapter.factors}

    def attached(self, model: Any) -> Any:
        """The base, with the factors beside its layers."""
        put_adapter(model, _NAME, self.adapter)
        route_of(model).active = _NAME
        return model

    def detach(self, model: Any) -> None:
        """Take the factors away."""
        route_of(model).active = None
        unload_adapter(model, _NAME)

    def _pair(self, place: str) -> Pair:
        a, b = self.adapter.factors[place]
        return a.float(), b.float() * self.adapter.scaling(place)


@dataclass(frozen=True)
class Replacement:
    """Whole weights, of which one tensor at a time is read."""

    folder: Path
    model: Any
    origins: Mapping[str, Origin]

    def change(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        """The difference to the base's weight."""
        if name not in self.origins:
            raise DeltaError(f"{self.folder}: no weights for `{name}`; it is not a whole model of this base")
        own = read(self.origins[name], self.model, torch.float32)
        if own.shape != weight.shape:
            shapes = f"{tuple(own.shape)} where this base has {tuple(weight.shape)}"
            raise DeltaError(f"{self.folder}: `{name}` has shape {shapes}; it is for another base")
        if not torch.isfinite(own).all():
            raise DeltaError(f"{self.folder}: `{name}` holds values that are not finite; train it again")
        return own - weight

    def pairs(self) -> None:
        """Not known."""
        return None

    def attached(self, model: Any) -> Any:
        """A model of its own."""
        del model
        return load_model(self.folder, attn="sdpa")

    def detach(self, model: Any) -> None:
        """It was never there."""


@dataclass(frozen=True)
class Layer:
    """Where low-rank factors of a parameter have their place."""

    place: str
    """Name of the linear layer or of the stack of experts."""
    transposed: bool
    """True if the parameter is held as `[..., in, out]`."""

    def laid_out(self, change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A change `[..., out, in]` as the parameter is laid out."""
        return (change.mT if self.transposed else change).reshape(weight.shape)

    def matrix(self, change: torch.Tensor) -> torch.Tensor:
        """A change laid out as the parameter is, as `[..., out, in]`."""
        return change.mT if self.transposed else change


class Sites:
    """Where the structure of a base can be changed.

    Args:
        model: the structure, its weights on meta or not.
        base: the base's folder.
    """

    def __init__(self, model: Any, base: Path) -> None:
        self.model, self._base = model, base
        self._adapters = AdapterSites(model)
        head = model.get_output_embeddings()
        parameters = {name for name, _ in model.named_parameters()}
        linear = {
            f"{name}.weight": (module is head, Layer(name, isinstance(module, Conv1D)))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        stacks = {
            name: (False, Layer(name, bool(model.get_submodule(name.rpartition(".")[0]).is_transposed)))
            for name in expert_stacks(model)
            if can_adapt(model, name)
        }
        # A tied output head goes by the embedding's name, where factors have no place.
        places = {name: place for name, place in (linear | stacks).items() if name in parameters}
        self.layers = {name: layer for name, (_, layer) in places.items()}
        """Parameter -> where its low-rank factors have their place."""
        self.served = {name: layer for name, (is_head, layer) in places.items() if not is_head}
        """The same without the output head, whose factors are not served."""

    def open(self, folder: Path, kind: str) -> Source:
        """The change that a delta makes. Raises `DeltaError` if it does not fit."""
        return _KINDS[kind](self, folder)

    def low_rank(self, folder: Path) -> Source:
        """A delta in PEFT's layout."""
        adapter = self._adapters.read(folder)
        if lost := adapter.factors.keys() - {layer.place for layer in self.layers.values()}:
            raise DeltaError(f"{folder}: `{min(lost)}` is tied to another weight; train without it")
        return LowRank(adapter, self.layers)

    def replacement(self, folder: Path) -> Source:
        """A delta of whole weights."""
        return Replacement(folder, self.model, find_origins(self.model, weight_map(folder)))

    def peft(self, folder: Path) -> Source:
        """A delta of another kind of PEFT's."""
        first = {id(parameter): name for name, parameter in self.model.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        return PeftAdapter(folder, self._base, {name: first[id(parameter)] for name, parameter in every})


_KINDS: dict[str, Callable[[Sites, Path], Source]] = {
    "low_rank": Sites.low_rank,
    "replacement": Sites.replacement,
    "peft": Sites.peft,
}
