"""Low-rank adaptation (Hu et al., arXiv:2106.09685), named and routed, in PEFT's file format."""

import hashlib
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from ftray.adapt.base import TRAINED, Facts, Tensors
from ftray.adapt.lora_experts import wrap_experts
from ftray.adapt.lora_files import load_adapter, save_adapter, unload_adapter
from ftray.adapt.lora_linear import LoRALinear, lora_layers, route_of, scaling_of, wrap
from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.model.select import Targets, expert_stacks

__all__ = ["TRAINED", "LoRA", "LoRALinear", "load_adapter", "lora_layers", "save_adapter", "unload_adapter"]


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
    target_parameters: list[str] | None = None
    """Stacks of expert matrices by name or last parts of it (`experts.down_proj`); each expert has its own factors.
    A mixture of experts must be told: `[]` leaves its experts as they are."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead (Kalajdzievski, arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        if self.target_parameters and self.lora_dropout:
            raise ConfigError(
                f"lora_dropout: {self.lora_dropout} cannot be applied to experts (PEFT refuses such an adapter); "
                "set it to 0, or `target_parameters: []`"
            )

    def facts(self) -> Facts:
        """Exact as low rank: merges, and shares a batch with others."""
        return Facts(kind="low_rank", mergeable=True, mixed_batch=True, detachable=True)

    def apply(self, model: Any, seed: int, name: str = TRAINED) -> None:
        """Wrap the targets and train one adapter: A uniform as PEFT draws it, B zero.

        Each factor has a generator seeded by its layer's name, so its start does not depend on the world size or on
        which other adapters there are.

        Args:
            model: the structure.
            seed: of the factors.
            name: of the adapter; one of that name gives way to it.

        Raises:
            ConfigError: if a target matches nothing, or it is not said what happens to experts.
        """
        self._check_experts(model)
        chosen = wrap(model, self.target_modules)
        chosen += wrap_experts(model, self.target_parameters or [], route_of(model))
        unload_adapter(model, name)
        for place, layer in lora_layers(model).items():
            if not any(layer is other for other in chosen):
                continue
            scaling = scaling_of(self.r, self.lora_alpha, self.use_rslora)
            layer.add(name, self.r, scaling, dropout=self.lora_dropout)
            digest = hashlib.sha256(f"{seed}:{place}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            bound = 1 / math.sqrt(layer.in_features)
            factor = layer.lora_A[name]
            with torch.no_grad():
                factor.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))
        route_of(model).active = name

    def parameters(self, model: Any, name: str) -> dict[str, nn.Parameter]:
        """Both factors of every adapted layer."""
        return {
            found.removesuffix(name) + TRAINED: parameter
            for found, parameter in model.named_parameters()
            if found.endswith((f".lora_A.{name}", f".lora_B.{name}"))
        }

    def remove(self, model: Any, name: str) -> None:
        """Drop its factors; layers stay adaptable."""
        unload_adapter(model, name)

    def _check_experts(self, model: Any) -> None:
        if self.target_parameters is None and (stacks := expert_stacks(model)):
            names = sorted({".".join(name.split(".")[-2:]) for name in stacks})
            raise ConfigError(
                f"adapt.target_modules: linear layers are not all of this model, its experts ({', '.join(names)}, "
                f"{len(stacks)} stacks) would stay as they are; set `target_parameters: [{', '.join(names)}]` to "
                "adapt them, or `[]` to leave them"
            )

    def save(self, model: Any, trained: Tensors, folder: Path, base_name: str, name: str = TRAINED) -> None:
        """Write the adapter `name` in PEFT's format."""
        save_adapter(
            model,
            name,
            folder,
            base_name,
            whole=dict(trained),
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
        )
