"""Low-rank adaptation (Hu et al., arXiv:2106.09685), named and routed, in PEFT's file format."""

import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftray.adapt.base import Facts, Tensors
from ftray.adapt.peft_files import CONFIG, PREFIX, WEIGHTS, read_config, read_factors
from ftray.adapt.route import Route
from ftray.core.errors import DeltaError
from ftray.core.fs import write_json
from ftray.core.spec import spec
from ftray.model.select import Targets, select_linear

TRAINED = "default"
"""Name of the adapter that a training run trains."""


class LoRALinear(nn.Module):
    """A linear layer with any number of named low-rank adapters: `y = W x + b + s_n B_n A_n x`.

    The base's parameters keep their names (`...q_proj.weight`), so its weights load as without adapters.
    Shapes: `lora_A[name]` is `[r, in_features]`, `lora_B[name]` is `[out_features, r]`.
    """

    def __init__(self, base: nn.Module, route: Route) -> None:
        super().__init__()
        self.transposed = isinstance(base, Conv1D)
        self.weight: nn.Parameter = base.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        shape = tuple(self.weight.shape)
        self.out_features, self.in_features = shape[::-1] if self.transposed else shape
        self.route = route
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def add(
        self, name: str, r: int, scaling: float, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        """Add an adapter of rank `r` with zero factors."""
        device = "cpu" if self.weight.device.type == "meta" else self.weight.device
        self.lora_A[name] = nn.Parameter(torch.zeros(r, self.in_features, dtype=dtype, device=device))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=device))
        self.scaling[name] = scaling
        self.dropout[name] = dropout

    def remove(self, name: str) -> None:
        """Drop an adapter; nothing happens if this layer does not have it."""
        if name in self.lora_A:
            del self.lora_A[name], self.lora_B[name], self.scaling[name], self.dropout[name]

    def _delta(self, x: torch.Tensor, name: str) -> torch.Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        x = F.dropout(x, self.dropout[name], self.training)
        # The cast is a no-op unless the base is held in bfloat16 while the factors are float32.
        return F.linear(F.linear(x.to(a.dtype), a), b) * self.scaling[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`, each token through its routed adapter."""
        if self.transposed:
            y = x @ self.weight if self.bias is None else x @ self.weight + self.bias
        else:
            y = F.linear(x, self.weight, self.bias)
        route = self.route
        if route.segments is None:
            name = route.active
            return y if name is None or name not in self.scaling else y + self._delta(x, name).to(y.dtype)
        return self._segments(x, y)

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


def wrap(model: Any, targets: Targets) -> Route:
    """Make the targeted linear layers adaptable; layers that are already stay. Returns the model's router."""
    route: Route = getattr(model, "ftray_route", None) or Route()
    model.ftray_route = route
    for name, layer in select_linear(model, targets).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoRALinear(layer, route))
    return route


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """All adaptable layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


@spec
class LoRA:
    """Low-rank adaptation of linear layers (Hu et al., arXiv:2106.09685)."""

    # Factors are replicated under every strategy, whatever happens to the base.
    supplies: ClassVar[tuple[str, ...]] = ("whole_matrices",)

    r: int = Field(default=16, ge=1)
    """Rank."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """Scaling numerator: the update is `lora_alpha / r * B A`."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: Targets = "all-linear"
    """Linear layers by name or last part of it, or `all-linear` (all but the output head)."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead (Kalajdzievski, arXiv:2312.03732)."""

    def facts(self) -> Facts:
        """Exact as low rank: merges, and shares a batch with others."""
        return Facts(kind="low_rank", mergeable=True, mixed_batch=True, detachable=True)

    def apply(self, model: Any, seed: int) -> None:
        """Wrap the targets and train one adapter: A uniform as PEFT draws it, B zero.

        Each factor has a generator seeded by its own name, so its start does not depend on the world size or on
        which other adapters there are.
        """
        route = wrap(model, self.target_modules)
        for name, layer in lora_layers(model).items():
            scaling = _scaling(self.r, self.lora_alpha, self.use_rslora)
            layer.add(TRAINED, self.r, scaling, dropout=self.lora_dropout)
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            bound = 1 / math.sqrt(layer.in_features)
            factor = layer.lora_A[TRAINED]
            with torch.no_grad():
                factor.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))
        route.active = TRAINED

    def save(self, model: Any, trained: Tensors, folder: Path, base_name: str) -> None:
        """Write the trained adapter in PEFT's format."""
        save_adapter(
            model,
            TRAINED,
            folder,
            base_name,
            whole=dict(trained),
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
        )


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

    `whole` has the factors by their names in the model where the model's own may be parts of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = {key: layer for key, layer in lora_layers(model).items() if name in layer.scaling}
    tensors = {}
    for key, layer in layers.items():
        for side, factor in (("lora_A", layer.lora_A[name]), ("lora_B", layer.lora_B[name])):
            tensor = (whole or {}).get(f"{key}.{side}.{name}", factor)
            tensors[f"{PREFIX}{key}.{side}.weight"] = tensor.detach().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": _short_names(model, layers),
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, config)


def _short_names(model: Any, layers: Mapping[str, LoRALinear]) -> list[str]:
    """Last parts of the layers' names where they mean these layers only, else whole names."""
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    meant = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | LoRALinear) and name.rpartition(".")[2] in leaves
    ]
    return leaves if len(meant) == len(layers) else sorted(layers)


def load_adapter(model: Any, name: str, folder: Path) -> None:
    """Load a LoRA folder in PEFT's format as adapter `name`; layers are made adaptable as needed.

    Raises:
        DeltaError: one line, if the folder is not such an adapter, uses a variant that is not plain LoRA, or
            does not fit this base.
    """
    config = read_config(folder)
    factors = read_factors(folder)
    route: Route = getattr(model, "ftray_route", None) or Route()
    model.ftray_route = route
    plan = {
        layer: _checked_pair(model, folder, layer, pair, config.ranks()) for layer, pair in factors.items()
    }
    unload_adapter(model, name)
    for layer, (a, b) in plan.items():
        target = _adaptable(model, layer, route)
        r = a.shape[0]
        target.add(name, r, _scaling(r, config.lora_alpha, config.use_rslora))
        with torch.no_grad():
            target.lora_A[name].copy_(a)
            target.lora_B[name].copy_(b)
        target.lora_A[name].requires_grad_(False)
        target.lora_B[name].requires_grad_(False)


def unload_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter `name` from every layer."""
    for layer in lora_layers(model).values():
        layer.remove(name)


def _checked_pair(
    model: Any, folder: Path, layer: str, pair: dict[str, torch.Tensor], ranks: Collection[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | Conv1D | LoRALinear) or len(pair) != 2:
        raise DeltaError(
            f"{folder}: `{layer}` is no linear layer of this base; the adapter is for another base"
        )
    a, b = pair["lora_A"], pair["lora_B"]
    shape = tuple(module.weight.shape)
    transposed = isinstance(module, Conv1D) or getattr(module, "transposed", False)
    out_features, in_features = shape[::-1] if transposed else shape
    if a.shape[1:] != (in_features,) or b.shape != (out_features, a.shape[0]):
        raise DeltaError(
            f"{folder}: `{layer}` has factors {tuple(a.shape)} and {tuple(b.shape)} where this base has "
            f"{out_features} x {in_features}; the adapter is for another base"
        )
    if a.shape[0] not in ranks:
        raise DeltaError(
            f"{folder}: `{layer}` has rank {a.shape[0]}, {CONFIG} says {sorted(ranks)}; save the adapter again"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise DeltaError(f"{folder}: `{layer}` holds values that are not finite; train it again")
    return a, b


def _adaptable(model: Any, name: str, route: Route) -> LoRALinear:
    module = model.get_submodule(name)
    if not isinstance(module, LoRALinear):
        parent, _, leaf = name.rpartition(".")
        module = LoRALinear(module, route)
        setattr(model.get_submodule(parent), leaf, module)
    return module
