"""PEFT's LoRA layers inside our loop: only the layer differs."""

from pathlib import Path
from typing import Any

from ftray.adapt.base import Facts, Tensors
from ftray.core.spec import spec


@spec
class PeftLoRA:
    """Rank 16 on all linear layers, factors in the type of the base, as ours are when they compute."""

    r: int = 16
    lora_alpha: float = 32.0

    def facts(self) -> Facts:
        """As LoRA."""
        return Facts(kind="low_rank", mergeable=True, mixed_batch=True)

    def apply(self, model: Any, seed: int) -> None:
        """Let PEFT inject its layers."""
        from peft import LoraConfig, inject_adapter_in_model

        settings = LoraConfig(r=self.r, lora_alpha=self.lora_alpha, target_modules="all-linear")
        del seed
        inject_adapter_in_model(settings, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = parameter.data.to(model.dtype)

    def save(self, model: Any, trained: Tensors, folder: Path, base_name: str) -> None:
        """Nothing is kept of a measurement."""
