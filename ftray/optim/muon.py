"""Muon for the matrices, AdamW for the rest (Jordan et al., 2024, kellerjordan.github.io/posts/muon)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from ftray.core.spec import spec
from ftray.optim.groups import ParamGroup, check_patterns, fuses, parameter_groups


@spec
class Muon:
    """Orthogonalised momentum on hidden 2-D weights; AdamW on embeddings, the head and vectors."""

    needs: ClassVar[Mapping[str, str]] = {
        "whole_matrices": "orthogonalises whole matrices",
        "local_optimizer": "steps matrices and the rest by two optimisers",
    }

    learning_rate: float = Field(default=0.02, gt=0)
    """Base learning rate of the matrices."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay of the matrices."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of the matrices."""
    adamw_learning_rate: float = Field(default=3e-3, gt=0)
    """Base learning rate of everything else."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    param_groups: list[ParamGroup] = Field(default_factory=list)
    """Learning rates and decays by name pattern, of the matrices and of the rest."""

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Two optimisers; embeddings and heads are recognised by their names."""
        check_patterns(list(parameters), self.param_groups)
        matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and not _is_table(n)}
        rest = {n: p for n, p in parameters.items() if n not in matrices}
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            groups = parameter_groups(matrices, self.learning_rate, self.weight_decay, self.param_groups)
            optimizers.append(torch.optim.Muon(groups, momentum=self.momentum))
        if rest:
            groups = parameter_groups(rest, self.adamw_learning_rate, 0.0, self.param_groups)
            betas = (self.adam_beta1, self.adam_beta2)
            optimizers.append(torch.optim.AdamW(groups, betas=betas, fused=fuses(list(rest.values()))))
        return optimizers


def _is_table(name: str) -> bool:
    return any(word in name for word in ("embed", "lm_head", "wte", "wpe"))
