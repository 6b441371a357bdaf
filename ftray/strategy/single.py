"""One process."""

from typing import Any

import torch

from ftray.core.spec import spec
from ftray.strategy import pieces
from ftray.strategy.base import Optimizers, Parameters
from ftray.strategy.step import OwnStep
from ftray.strategy.workers import local_device


@spec
class Single(OwnStep):
    """Everything in one process."""

    @property
    def in_process(self) -> bool:
        """No worker group."""
        return True

    @property
    def num_workers(self) -> int:
        """One."""
        return 1

    @property
    def dp_rank(self) -> int:
        """The only rank."""
        return 0

    @property
    def dp_size(self) -> int:
        """One."""
        return 1

    @property
    def device(self) -> torch.device:
        """The first GPU if there is one, else the CPU."""
        return local_device()

    @property
    def weights_device(self) -> torch.device:
        """Where it computes."""
        return self.device

    def prepare(self, model: Any, *, bf16: bool) -> Any:
        """Nothing to spread."""
        del bf16
        return model

    def snapshot(self, parameters: Parameters, optimizers: Optimizers, *, copy: bool = True) -> pieces.Pieces:
        """Everything, in one piece each."""
        return pieces.take(parameters, optimizers, rank=self.dp_rank, num_writers=1, copy=copy)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves."""
        return values

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""
