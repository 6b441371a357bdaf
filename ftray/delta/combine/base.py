"""What a way of combining deltas is: a function of the changes they make to one tensor."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from ftray.core.errors import ConfigError


class Combination(Protocol):
    """Several changes of one tensor to one change."""

    def weights(self, num_deltas: int) -> list[float] | None:
        """The weight of each delta if the result is their weighted sum; None if it is not.

        A weighted sum of low-rank deltas is low-rank, and exact.

        Raises:
            ConfigError: if it does not take so many deltas.
        """
        ...

    def combine(self, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        """One change from those of all deltas, in float32 and of one shape; zero where a delta has none."""
        ...


class WeightedSum:
    """A combination that is linear in the changes."""

    @abstractmethod
    def weights(self, num_deltas: int) -> list[float]:
        """The weight of each delta."""

    def combine(self, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weighted sum."""
        weights = self.weights(len(changes))
        return torch.stack([change * weight for change, weight in zip(changes, weights, strict=True)]).sum(0)


def one_for_each(weights: Sequence[float] | None, num_deltas: int, default: float = 1.0) -> list[float]:
    """The weights given, or equal ones. Raises `ConfigError` if there is not one for each delta."""
    if weights is None:
        return [default] * num_deltas
    if len(weights) != num_deltas:
        raise ConfigError(
            f"weights: {list(weights)} are {len(weights)} for {num_deltas} deltas; give one for each"
        )
    return list(weights)
