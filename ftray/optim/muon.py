"""Muon for the matrices, AdamW for the rest (Jordan et al., 2024, kellerjordan.github.io/posts/muon)."""

from collections.abc import Mapping

import torch
from pydantic import Field

from ftray.core.spec import spec


@spec
class Muon:
    """Orthogonalised momentum on hidden 2-D weights; AdamW on embeddings, the head and vectors."""

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

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Two optimisers; embeddings and heads are recognised by their names."""
        matrices = [p for n, p in parameters.items() if p.ndim == 2 and not _is_table(n)]
        rest = [p for n, p in parameters.items() if p.ndim != 2 or _is_table(n)]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers.append(
                torch.optim.Muon(
                    matrices, lr=self.learning_rate, weight_decay=self.weight_decay, momentum=self.momentum
                )
            )
        if rest:
            betas = (self.adam_beta1, self.adam_beta2)
            optimizers.append(
                torch.optim.AdamW(
                    rest, lr=self.adamw_learning_rate, betas=betas, weight_decay=0.0, fused=True
                )
            )
        return optimizers


def _is_table(name: str) -> bool:
    return any(word in name for word in ("embed", "lm_head", "wte", "wpe"))
