"""Put the engine's linear layers into a model's graph, in place of its own."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftray.core.errors import DeltaError
from ftray.engine.linear import Fused, FusedPart, SlotLinear, StepRoute
from ftray.engine.lora_slots import Pair, Prepared
from ftray.engine.pointwise import GatedUnit, same, swap_norms, takes

_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Neighbours that architectures call one after another with the same tensor."""


Placed = list[tuple[SlotLinear, Prepared]]
"""A delta's factors and the layers they belong to."""


@dataclass(frozen=True)
class Site:
    """Where a linear layer of the model went: a part of a layer of ours."""

    linear: SlotLinear
    part: int


class Swapped:
    """A model's linear layers, swapped.

    Args:
        model: a frozen model; its `nn.Linear` and `Conv1D` modules are replaced, their weights let go.
        num_slots: low-rank deltas in place at once; more make room for themselves.
        max_rank: greatest rank of one; every slot of a layer is as wide as its widest delta.
    """

    def __init__(self, model: nn.Module, num_slots: int, max_rank: int = 256) -> None:
        self._max_rank = max_rank
        self.route = StepRoute()
        self.sites: dict[str, Site] = {}
        """Name of a linear layer -> where it is now."""
        for names in _groups(model):
            self._swap(model, names, num_slots)
        self._swap_gated(model)
        swap_norms(model)

    def prepare(self, factors: Mapping[str, Pair]) -> Placed:
        """A delta's factors, by layers' names, as `put` takes them; may run beside a step.

        Raises:
            DeltaError: if one has too great a rank.
        """
        parts: dict[SlotLinear, dict[int, Pair]] = defaultdict(dict)
        for name, pair in factors.items():
            self.check_rank(name, len(pair.a_RI))
            site = self.sites[name]
            parts[site.linear][site.part] = pair
        return [(linear, linear.slots.prepare(mine)) for linear, mine in parts.items()]

    def check_rank(self, name: str, rank: int) -> None:
        """Raise `DeltaError` if a layer's factors have too great a rank."""
        if rank > self._max_rank:
            raise DeltaError(
                f"`{name}` has rank {rank}, more than max_lora_rank: {self._max_rank}; truncate the delta"
                " (`ftray delta scale --factor 1 --rank`) or raise the setting"
            )

    def put(self, slot: int, prepared: Placed) -> None:
        """Put a delta into a slot that is clear."""
        for linear, mine in prepared:
            linear.slots.put(slot, mine)

    def clear(self, slot: int) -> None:
        """Empty a slot in every layer."""
        for site in self.sites.values():
            site.linear.slots.clear(slot)

    def _swap(self, model: nn.Module, names: list[str], num_slots: int) -> None:
        modules = [model.get_submodule(name) for name in names]
        weights = [_weight(module) for module in modules]
        linear = SlotLinear(weights, [_bias(module) for module in modules], self.route, num_slots)
        shared = Fused(linear) if len(names) > 1 else None
        for part, name in enumerate(names):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, FusedPart(shared, part) if shared else linear)
            self.sites[name] = Site(linear, part)

    def _swap_gated(self, model: nn.Module) -> None:
        """Let gated units that are what they look like pass from one product to the next without a detour."""
        for name, unit in list(model.named_modules()):
            gate, down = getattr(unit, "gate_proj", None), getattr(unit, "down_proj", None)
            if not isinstance(gate, FusedPart) or not isinstance(down, SlotLinear):
                continue
            fused = GatedUnit(gate.shared, down)
            weights = torch.empty(down.in_features, dtype=down.dtype, device=down.device)
            if takes(weights) and same(unit, fused, gate.in_features, down.dtype):
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, fused)


def _groups(model: nn.Module) -> Iterator[list[str]]:
    """Names of all linear layers, those that share their input together."""
    linear = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    grouped = set()
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name in linear):
        for leaves in _SHARED_INPUT:
            names = [f"{prefix}.{leaf}" for leaf in leaves]
            if all(name in linear for name in names) and _alike([linear[name] for name in names]):
                grouped |= set(names)
                yield names
    yield from ([name] for name in linear if name not in grouped)


def _alike(modules: list[Any]) -> bool:
    same_input = len({_weight(module).shape[1] for module in modules}) == 1
    return same_input and len({module.bias is None for module in modules}) == 1


def _weight(module: Any) -> torch.Tensor:
    """`[out, in]`."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _bias(module: Any) -> torch.Tensor | None:
    return None if module.bias is None else module.bias.detach()
