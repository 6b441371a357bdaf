"""AdamW (Loshchilov & Hutter, arXiv:1711.05101)."""

from collections.abc import Mapping

import torch
from pydantic import Field

from ftray.core.spec import spec


@spec
class AdamW:
    """Adam with decoupled weight decay; PyTorch's fused implementation."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Base learning rate; the schedule multiplies it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; vectors (norms, biases) are not decayed."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        """One optimiser over the named parameters."""
        groups = [
            {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return [
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=self.learning_rate,
                betas=(self.adam_beta1, self.adam_beta2),
                eps=self.adam_epsilon,
                fused=True,
            )
        ]
