"""Replicated parameters, rows divided over workers, gradients summed once a step."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field

from ftray.core.spec import spec
from ftray.strategy.base import Update
from ftray.strategy.single import clip_and_step


@spec
class DDP:
    """Data parallelism: one all-reduce of the flattened gradients per optimiser step.

    The losses are already divided by global counts, so gradients are summed, not averaged, and a rank whose
    rows hold no target adds zeros. One flat all-reduce after the last micro batch is the right form for
    adapters, whose gradients are small, and exact for full fine-tuning.
    """

    num_workers: int = Field(default=2, ge=1)
    """Workers."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs of each worker."""
    max_failures: int = Field(default=2, ge=0)
    """Times the worker group is restarted from its newest checkpoint."""

    @property
    def in_process(self) -> bool:
        """Workers of Ray Train, even if it is one."""
        return False

    @property
    def dp_rank(self) -> int:
        """Rank in the process group."""
        return dist.get_rank()

    @property
    def dp_size(self) -> int:
        """Size of the process group."""
        return dist.get_world_size()

    def prepare(self, model: Any) -> Any:
        """Every rank loads the same files, so the replicas start equal."""
        return model

    def backward(self, loss: torch.Tensor) -> None:
        """Local backward; the ranks meet in `update`."""
        loss.backward()

    def update(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        max_grad_norm: float | None,
        *,
        sound: bool,
    ) -> Update:
        """Sum the gradients over ranks, then clip and step as one process would."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        dist.all_reduce(flat)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return clip_and_step(parameters, optimizers, max_grad_norm, sound=sound)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def share(self, value: Any) -> Any:
        """Broadcast from rank 0."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Process group barrier."""
        dist.barrier()
