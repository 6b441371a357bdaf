"""How a step is spread over workers. The training loop has no branch on a strategy's name.

The data-parallel rank and size come from here and never from the world, so that tensor or context parallelism
can divide the world further without touching data order, loss counts or seeds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch


@dataclasses.dataclass(frozen=True)
class Update:
    """What `update` did."""

    grad_norm: float
    """Norm of the whole gradient before clipping."""
    applied: bool
    """False if loss or gradient was not finite: then no parameter moved, on any rank."""


class Strategy(Protocol):
    """One way to spread a run."""

    num_workers: int

    @property
    def in_process(self) -> bool:
        """True if the run needs no worker group."""
        ...

    @property
    def dp_rank(self) -> int:
        """This process's place among those that see different rows."""
        ...

    @property
    def dp_size(self) -> int:
        """How many processes see different rows."""
        ...

    def prepare(self, model: Any) -> Any:
        """Spread a structure that is still on meta."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro batch's gradients."""
        ...

    def update(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        max_grad_norm: float | None,
        *,
        sound: bool,
    ) -> Update:
        """Reduce, clip and step as one call (DeepSpeed owns all three); gradients are cleared.

        Nothing moves if the gradient is not finite, or if `sound` is False because the loss is not.
        """
        ...

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the data-parallel ranks."""
        ...

    def share(self, value: Any) -> Any:
        """Rank 0's value of a plain object, on every rank."""
        ...

    def barrier(self) -> None:
        """Return when every rank has come here."""
        ...
