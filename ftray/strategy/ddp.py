"""Replicated parameters, rows divided over workers, gradients summed once a step."""

from collections.abc import Sequence
from typing import Any

import torch

from ftray.core.spec import spec
from ftray.strategy import pieces
from ftray.strategy.base import Optimizers, Parameters
from ftray.strategy.step import OwnStep
from ftray.strategy.workers import Workers, sum_flat


@spec
class DDP(Workers, OwnStep):
    """Data parallelism: the gradients are summed over the workers once an optimiser step.

    The losses are already divided by global counts, so gradients are summed, not averaged, and a rank whose
    rows hold no target adds zeros. Flat all-reduces after the last micro batch are the right form for
    adapters, whose gradients are small, and exact for full fine-tuning.
    """

    def prepare(self, model: Any, *, bf16: bool) -> Any:
        """Every rank loads the same files, so the replicas start equal."""
        del bf16
        return model

    def reduce(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over ranks; one that a rank has none of is zero there."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, total in zip(parameters, sum_flat(gradients), strict=True):
            parameter.grad = total

    def snapshot(self, parameters: Parameters, optimizers: Optimizers, *, copy: bool = True) -> pieces.Pieces:
        """Everything, on rank 0."""
        return pieces.take(parameters, optimizers, rank=self.dp_rank, num_writers=1, copy=copy)
