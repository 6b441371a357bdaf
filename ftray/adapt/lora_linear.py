"""Named low-rank factors, and the linear layer that adds them to its output."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftray.adapt.low_rank import LowRankLinear
from ftray.adapt.route import Route
from ftray.model.select import Targets, select_linear


class Factors(nn.Module):
    """Any number of named low-rank adapters of one matrix, or of a stack of them.

    Shapes: `lora_A[name]` is `[*stack, r, in_features]`, `lora_B[name]` is `[*stack, out_features, r]`.

    Args:
        weight: what is adapted; the factors are made on its device.
        stack: leading axes of the weight; none for a single matrix.
        in_features: columns of a matrix.
        out_features: rows of a matrix.
    """

    def __init__(
        self, weight: nn.Parameter, stack: Sequence[int], in_features: int, out_features: int
    ) -> None:
        super().__init__()
        self.stack, self.in_features, self.out_features = tuple(stack), in_features, out_features
        self._device = torch.device("cpu") if weight.device.type == "meta" else weight.device
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def add(
        self, name: str, r: int, scaling: float, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        """Add an adapter of rank `r` with zero factors."""
        a = torch.zeros(*self.stack, r, self.in_features, dtype=dtype, device=self._device)
        b = torch.zeros(*self.stack, self.out_features, r, dtype=dtype, device=self._device)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(a), nn.Parameter(b)
        self.scaling[name] = scaling
        self.dropout[name] = dropout

    def remove(self, name: str) -> None:
        """Drop an adapter; nothing happens if this layer does not have it."""
        if name in self.lora_A:
            del self.lora_A[name], self.lora_B[name], self.scaling[name], self.dropout[name]


class LoRALinear(Factors):
    """A linear layer with any number of named low-rank adapters: `y = W x + b + s_n B_n A_n x`.

    The base's parameters keep their names (`...q_proj.weight`), so its weights load as without adapters.
    """

    def __init__(self, base: nn.Module, route: Route) -> None:
        weight: nn.Parameter = base.weight  # type: ignore[assignment]
        transposed = isinstance(base, Conv1D)
        shape = tuple(weight.shape)
        out_features, in_features = shape[::-1] if transposed else shape
        super().__init__(weight, (), in_features, out_features)
        self.transposed = transposed
        self.weight = weight
        self.bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        self.route = route

    def _delta(self, x: torch.Tensor, name: str) -> torch.Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        x = F.dropout(x, self.dropout[name], self.training)
        # The cast is a no-op unless the base is held in bfloat16 while the factors are float32.
        return F.linear(F.linear(x.to(a.dtype), a), b) * self.scaling[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`, each token through its routed adapter."""
        name = self.route.active
        if self.route.segments is None and name in self.scaling and self._trains_alone(name):
            a, b = self.lora_A[name], self.lora_B[name]
            together: torch.Tensor = LowRankLinear.apply(x, self.weight, self.bias, a, b, self.scaling[name])
            return together
        if self.transposed:
            y = x @ self.weight if self.bias is None else x @ self.weight + self.bias
        else:
            y = F.linear(x, self.weight, self.bias)
        route = self.route
        if route.segments is None:
            name = route.active
            return y if name is None or name not in self.scaling else y + self._delta(x, name).to(y.dtype)
        return self._segments(x, y)

    def _trains_alone(self, name: str) -> bool:
        """True if the factors train and nothing else does, and they see the layer's input as it is."""
        frozen = not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)
        same_input = not self.training or not self.dropout[name]
        return torch.is_grad_enabled() and frozen and same_input and not self.transposed

    def _segments(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert self.route.segments is not None
        tokens_x, tokens_y = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        assert self.route.segments[-1][2] == len(tokens_x), (
            "the segments must cover the tokens this layer sees"
        )
        mine = [segment for segment in self.route.segments if segment[0] in self.scaling]
        if not torch.is_grad_enabled():
            for name, start, stop in mine:
                assert name is not None
                tokens_y[start:stop] += self._delta(tokens_x[start:stop], name)
            return tokens_y.view(y.shape)
        pieces = []
        for name, start, stop in self.route.segments:
            piece = tokens_y[start:stop]
            if name in self.scaling:
                assert name is not None
                piece = piece + self._delta(tokens_x[start:stop], name).to(y.dtype)
            pieces.append(piece)
        return torch.cat(pieces).view(y.shape)


def route_of(model: Any) -> Route:
    """The router all adapted layers of a model share."""
    route: Route = getattr(model, "ftray_route", None) or Route()
    model.ftray_route = route
    return route


def wrap(model: Any, targets: Targets) -> Route:
    """Make the targeted linear layers adaptable; layers that are already stay. Returns the model's router."""
    route = route_of(model)
    for name in select_linear(model, targets):
        adaptable(model, name, route)
    return route


def adaptable(model: Any, name: str, route: Route) -> LoRALinear:
    """One linear layer, made adaptable if it is not yet."""
    module = model.get_submodule(name)
    if not isinstance(module, LoRALinear):
        parent, _, leaf = name.rpartition(".")
        module = LoRALinear(module, route)
        setattr(model.get_submodule(parent), leaf, module)
    return module


def lora_layers(model: nn.Module) -> dict[str, Factors]:
    """All that holds factors, by name: linear layers, and stacks of experts (`...experts.down_proj_lora`)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factors)}


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """What the update is multiplied by."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)
