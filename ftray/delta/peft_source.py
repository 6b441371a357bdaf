"""Adapters of PEFT's that are not plain low rank (IA3, LoHa, DoRA, saved modules...), by what they merge to.

PEFT itself applies and merges them; here they are only asked what they change.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftray.core.errors import DeltaError


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A delta that is known by its merged weights, held in memory as a whole model."""

    folder: Path
    base: Path
    names: Mapping[str, str]
    """Every name of a parameter of the base -> the first one of the same tensor (tied weights have two)."""

    def change(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        """The difference that merging makes; None if there is none."""
        difference = self._merged[name].detach() - weight
        return difference if difference.any() else None

    def pairs(self) -> None:
        """Not known."""
        return None

    def attached(self, model: Any) -> Any:
        """PEFT's own model, over a base of its own."""
        del model
        try:
            from peft import PeftModel
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise DeltaError(f"{self.folder}: needs `peft` to be read; install it") from None
        base = AutoModelForCausalLM.from_pretrained(
            self.base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        try:
            return PeftModel.from_pretrained(base, str(self.folder)).eval()
        # What a stranger's settings make PEFT raise is of any kind.
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise DeltaError(
                f"{self.folder}: PEFT cannot load it ({type(error).__name__}: {reason})"
            ) from None

    def detach(self, model: Any) -> None:
        """It was never there."""

    @functools.cached_property
    def _merged(self) -> dict[str, torch.Tensor]:
        adapted = self.attached(None)
        if not hasattr(adapted.base_model, "merge_and_unload"):
            kind = adapted.active_peft_config.peft_type.value
            raise DeltaError(
                f"{self.folder}: {kind} cannot be merged into the base; train a low-rank adapter"
            )
        merged = dict(adapted.merge_and_unload(safe_merge=True).named_parameters(remove_duplicate=False))
        for name, first in self.names.items():
            if name != first and not torch.equal(merged[name], merged[first]):
                raise DeltaError(
                    f"{self.folder}: it changes `{name}`, which the base ties to `{first}`; train without it"
                )
        return merged
