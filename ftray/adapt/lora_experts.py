"""Low-rank adapters of experts: each expert of a stack `[E, out, in]` has factors of its own.

The layers stay transformers' own; their forward is chosen by name in its `ExpertsInterface`, so what differs
between architectures (the gate, biases, transposed stacks) stays with them. The update is added to activations, so
no adapted copy of a stack is ever made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface, _grouped_linear, grouped_mm_experts_forward

from ftray.adapt.lora_linear import Factors
from ftray.adapt.route import Route
from ftray.core.errors import ConfigError
from ftray.model.select import expert_stacks

NAME = "ftray_lora"
"""What `ExpertsInterface` knows our forward by."""
_SUFFIX = "_lora"


class ExpertFactors(Factors):
    """Adapters of one stack of expert matrices, beside the stack in the experts' module."""

    def __init__(self, experts: Any, leaf: str) -> None:
        weight: nn.Parameter = getattr(experts, leaf)
        num_experts, first, second = weight.shape
        out_features, in_features = (second, first) if experts.is_transposed else (first, second)
        super().__init__(weight, (num_experts,), in_features, out_features)
        self.leaf = leaf

    def delta(self, x_SI: torch.Tensor, name: str, counts: Sequence[int]) -> torch.Tensor:
        """Update `[S, out]` of inputs sorted by expert, of which expert `e` has the next `counts[e]`."""
        a, b = self.lora_A[name], self.lora_B[name]
        low = _by_expert(x_SI.to(a.dtype), a, counts)
        return _by_expert(low, b, counts) * self.scaling[name]


def _by_expert(x_SI: torch.Tensor, stack_EOI: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    # Ranks are too small and odd for a grouped kernel. `unbind` has one gradient for the stack, not one an expert.
    parts = zip(x_SI.split(list(counts)), stack_EOI.unbind(0), strict=True)
    return torch.cat([nn.functional.linear(part, matrix) for part, matrix in parts])


def wrap_experts(model: Any, targets: Sequence[str], route: Route) -> list[Factors]:
    """The targeted stacks, made adaptable: `targets` are parameter names or their last parts.

    Raises:
        ConfigError: if a target matches no stack, or its layer has no forward that can be replaced.
    """
    stacks = expert_stacks(model)
    chosen: list[Factors] = []
    for target in targets:
        hits = [name for name in stacks if name == target or name.endswith("." + target)]
        if not hits:
            known = sorted({".".join(name.split(".")[-2:]) for name in stacks})
            raise ConfigError(
                f"target_parameters: {target!r} matches no stack of experts; here: {', '.join(known) or 'none'}"
            )
        chosen += [add_factors(model, name, route) for name in hits]
    return chosen


def can_adapt(model: Any, name: str) -> bool:
    """True if the layer of a stack computes its experts through transformers' `ExpertsInterface`."""
    return hasattr(model.get_submodule(name.rpartition(".")[0]), "has_gate")


def add_factors(model: Any, name: str, route: Route) -> ExpertFactors:
    """Make one stack adaptable; one that is already stays."""
    owner, _, leaf = name.rpartition(".")
    experts = model.get_submodule(owner)
    if not can_adapt(model, name):
        raise ConfigError(
            f"target_parameters: {owner} ({type(experts).__name__}) computes its experts in a way that cannot be "
            "adapted; leave it out"
        )
    if not hasattr(experts, leaf + _SUFFIX):
        setattr(experts, leaf + _SUFFIX, ExpertFactors(experts, leaf))
        experts.ftray_route = route
        model.set_experts_implementation(NAME)
    found: ExpertFactors = getattr(experts, leaf + _SUFFIX)
    return found


def peft_names(model: Any, stacks: Sequence[str]) -> dict[str, str]:
    """PEFT's name of the layer that holds the factors of each of these adapted stacks.

    PEFT wraps a module once for each of its adapted parameters, in their order: the last one is outermost and the
    others lie below it as `base_layer`.
    """
    names: dict[str, str] = {}
    for owner in {name.rpartition(".")[0] for name in stacks}:
        mine = [
            f"{owner}.{leaf}"
            for leaf, _ in model.get_submodule(owner).named_parameters(recurse=False)
            if f"{owner}.{leaf}" in stacks
        ]
        names |= {name: owner + ".base_layer" * depth for depth, name in enumerate(mine[::-1])}
    return names


def to_peft(a_ERI: torch.Tensor, b_EOR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors in PEFT's layout: A `[E * r, in]`, expert by expert; B `[out, r * E]`, the expert index fastest."""
    return a_ERI.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1, 2)


def from_peft(a: torch.Tensor, b: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse of `to_peft`."""
    a_ERI = a.reshape(num_experts, -1, a.shape[1])
    return a_ERI, b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)


class _Tokens:
    """Which (token, expert) pairs go through which adapter, the pairs sorted by expert."""

    def __init__(
        self, route: Route, experts_S: torch.Tensor, tokens_S: torch.Tensor, num_experts: int
    ) -> None:
        self._experts, self._num_experts = experts_S, num_experts
        segments = route.segments
        if segments is None:
            self.parts: list[tuple[str, torch.Tensor | None, list[int]]] = (
                [] if route.active is None else [(route.active, None, self._counts(experts_S))]
            )
            return
        self.parts = []
        for name in dict.fromkeys(name for name, _, _ in segments if name is not None):
            inside = torch.zeros_like(tokens_S, dtype=torch.bool)
            for other, start, stop in segments:
                if other == name:
                    inside |= (tokens_S >= start) & (tokens_S < stop)
            (where,) = torch.nonzero(inside, as_tuple=True)
            self.parts.append((name, where, self._counts(experts_S[where])))

    def _counts(self, experts: torch.Tensor) -> list[int]:
        counts: list[int] = torch.bincount(experts, minlength=self._num_experts).tolist()
        return counts

    def add(self, factors: Factors | None, x_SI: torch.Tensor, y_SO: torch.Tensor) -> torch.Tensor:
        """The output of a stack with the update of each adapter it has."""
        if not isinstance(factors, ExpertFactors):
            return y_SO
        for name, where, counts in self.parts:
            if name in factors.scaling:
                x = x_SI if where is None else x_SI[where]
                delta = factors.delta(x, name, counts).to(y_SO.dtype)
                y_SO = y_SO + delta if where is None else y_SO.index_add(0, where, delta)
        return y_SO


def adapted_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts signature: hidden states `[N, D]`, the chosen experts and their weights `[N, k]`."""
    route: Route | None = getattr(self, "ftray_route", None)
    if route is None or (route.active is None and route.segments is None):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    num_tokens, top_k = top_k_index.shape
    experts_S, order = torch.sort(top_k_index.reshape(-1), stable=True)
    offsets = torch.bincount(experts_S, minlength=self.num_experts).cumsum(0).int()
    tokens = _Tokens(route, experts_S, order // top_k, self.num_experts)

    def linear(leaf: str, x_SI: torch.Tensor) -> torch.Tensor:
        bias = getattr(self, f"{leaf}_bias")[experts_S] if self.has_bias else None
        weight, transposed = getattr(self, leaf), self.is_transposed
        y_SO = _grouped_linear(x_SI, weight, offsets, bias=bias, is_transposed=transposed)
        return tokens.add(getattr(self, leaf + _SUFFIX, None), x_SI, y_SO)

    x_SD = hidden_states[order // top_k]
    up = linear("gate_up_proj" if self.has_gate else "up_proj", x_SD)
    out_SD = linear("down_proj", self._apply_gate(up) if self.has_gate else self.act_fn(up))
    if self.has_post_expert_norm:
        out_SD = self.post_expert_norm(out_SD)
    weighted = out_SD * top_k_weights.reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(num_tokens, top_k, -1).sum(1).to(hidden_states.dtype)


ExpertsInterface.register(NAME, adapted_experts_forward)


def expert_factors(model: nn.Module) -> Mapping[str, ExpertFactors]:
    """All adaptable stacks by the name of their parameter."""
    return {
        name.removesuffix(_SUFFIX): module
        for name, module in model.named_modules()
        if isinstance(module, ExpertFactors)
    }
