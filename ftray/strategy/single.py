"""One process."""

from collections.abc import Sequence
from typing import Any

import torch

from ftray.core.spec import spec
from ftray.strategy.base import Update


@spec
class Single:
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

    def prepare(self, model: Any) -> Any:
        """Nothing to spread."""
        return model

    def backward(self, loss: torch.Tensor) -> None:
        """Plain backward."""
        loss.backward()

    def update(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        max_grad_norm: float | None,
        *,
        sound: bool,
    ) -> Update:
        """Clip by the global norm and step, unless the gradient is not finite."""
        return clip_and_step(parameters, optimizers, max_grad_norm, sound=sound)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves."""
        return values

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""


def clip_and_step(
    parameters: Sequence[torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    max_grad_norm: float | None,
    *,
    sound: bool,
) -> Update:
    """Clip reduced gradients by their global norm, step, and clear them.

    Every rank holds the same reduced gradient, so all of them see the same norm and take the same decision: a
    gradient that is not finite on one rank is not finite on any, and moves nothing.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    applied = sound and bool(torch.isfinite(norm))
    if applied:
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return Update(grad_norm=float(norm), applied=applied)
