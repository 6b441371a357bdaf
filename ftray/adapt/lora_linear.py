"""Named low-rank factors, and the linear layer that adds them to its output."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftray.adapt.low_rank import LowRankLinear, Update, kept
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

    stands_for_linear: ClassVar[bool] = True

    def __init__(self, base: nn.Module, route: Route, name: str = "") -> None:
        weight: nn.Parameter = base.weight  # type: ignore[assignment]
        transposed = isinstance(base, Conv1D)
        shape = tuple(weight.shape)
        out_features, in_features = shape[::-1] if transposed else shape
        super().__init__(weight, (), in_features, out_features)
        self.transposed = transposed
        self.weight = weight
        self.bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        self.route, self.name = route, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`, each token through its routed adapter."""
        route, tokens = self.route, x.numel() // self.in_features
        segments = [(route.active, 0, tokens)] if route.segments is None else route.segments
        assert segments[-1][2] == tokens, "the segments must cover the tokens this layer sees"
        mine = [
            (name, self._update(place, name, start, stop))
            for place, (name, start, stop) in enumerate(segments)
            if name is not None and name in self.scaling
        ]
        if mine and self._factors_alone_train():
            factors = [factor for name, _ in mine for factor in (self.lora_A[name], self.lora_B[name])]
            together: torch.Tensor = LowRankLinear.apply(
                x, self.weight, self.bias, [update for _, update in mine], *factors
            )
            return together
        if self.transposed:
            y = x @ self.weight if self.bias is None else x @ self.weight + self.bias
        else:
            y = F.linear(x, self.weight, self.bias)
        return self._added(x, y, mine) if mine else y

    def _update(self, segment: int, name: str, start: int, stop: int) -> Update:
        dropout = self.dropout[name] if self.training else 0.0
        seed = self.route.seed(segment, self.name) if dropout else 0
        return Update(start, stop, self.scaling[name], dropout, seed)

    def _factors_alone_train(self) -> bool:
        """True if gradients are asked for, and of the base's own parameters none trains."""
        frozen = not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)
        return torch.is_grad_enabled() and frozen and not self.transposed

    def _delta(self, x: torch.Tensor, name: str, update: Update) -> torch.Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        if update.dropout:
            x = x * kept(x, update.dropout, update.seed)
        # The cast is a no-op unless the base is held in bfloat16 while the factors are float32.
        return F.linear(F.linear(x.to(a.dtype), a), b) * update.scaling

    def _added(self, x: torch.Tensor, y: torch.Tensor, mine: Sequence[tuple[str, Update]]) -> torch.Tensor:
        """The base's output with the updates added."""
        tokens_x, tokens_y = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        if not torch.is_grad_enabled():
            for name, update in mine:
                part = slice(update.start, update.stop)
                tokens_y[part] += self._delta(tokens_x[part], name, update)
            return tokens_y.view(y.shape)
        pieces, end = [], 0
        for name, update in mine:
            part = slice(update.start, update.stop)
            delta = self._delta(tokens_x[part], name, update).to(y.dtype)
            pieces += [tokens_y[end : update.start], tokens_y[part] + delta]
            end = update.stop
        return torch.cat([*pieces, tokens_y[end:]]).view(y.shape)


def route_of(model: Any) -> Route:
    """The router all adapted layers of a model share."""
    route: Route = getattr(model, "ftray_route", None) or Route()
    model.ftray_route = route
    return route


def wrap(model: Any, targets: Targets) -> list[Factors]:
    """The targeted linear layers, made adaptable where they are not yet."""
    route = route_of(model)
    return [adaptable(model, name, route) for name in select_linear(model, targets)]


def adaptable(model: Any, name: str, route: Route) -> LoRALinear:
    """One linear layer, made adaptable if it is not yet."""
    module = model.get_submodule(name)
    if not isinstance(module, LoRALinear):
        parent, _, leaf = name.rpartition(".")
        module = LoRALinear(module, route, name)
        setattr(model.get_submodule(parent), leaf, module)
    return module


def lora_layers(model: nn.Module) -> dict[str, Factors]:
    """All that holds factors, by name: linear layers, and stacks of experts (`...experts.down_proj_lora`)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factors)}


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """What the update is multiplied by."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)
