"""AdamW (Loshchilov & Hutter, arXiv:1711.05101)."""

from collections.abc import Mapping

import torch
from pydantic import Field

from ftray.core.spec import spec
from ftray.optim.groups import ParamGroup, check_patterns, fuses, parameter_groups


@spec
class AdamW:
    """Adam with decoupled weight decay; PyTorch's fused kernel where there is one."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Base learning rate; the schedule multiplies it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; norms, biases and other vectors are not decayed."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    param_groups: list[ParamGroup] = Field(default_factory=list)
    """Learning rates and decays by name pattern."""

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        """One optimiser over the named parameters. Raises `ConfigError` for a pattern that matches none."""
        check_patterns(list(parameters), self.param_groups)
        return [
            torch.optim.AdamW(
                parameter_groups(parameters, self.learning_rate, self.weight_decay, self.param_groups),
                betas=(self.adam_beta1, self.adam_beta2),
                eps=self.adam_epsilon,
                fused=fuses(list(parameters.values())),
            )
        ]
