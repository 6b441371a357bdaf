"""Deltas combined without letting them cancel each other."""

from collections.abc import Sequence

import torch
from pydantic import Field

from ftray.core.spec import spec
from ftray.delta.combine.base import one_for_each


@spec
class Ties:
    """TIES: trim small changes, elect a sign, take the mean of those that agree (Yadav et al., arXiv:2306.01708).

    Trimming is per tensor, as in PEFT and mergekit.
    """

    density: float = Field(default=0.2, gt=0, le=1)
    """Fraction of each tensor's largest changes that is kept."""
    coefficients: list[float] | None = None
    """One for each delta; 1 for all if left out."""

    def weights(self, num_deltas: int) -> None:
        """It is no weighted sum."""
        one_for_each(self.coefficients, num_deltas)

    def combine(self, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Trim, elect, and take the mean, in which the coefficients come in last, as in PEFT."""
        coefficients = one_for_each(self.coefficients, len(changes))
        kept = torch.stack([_trim(change, self.density) for change in changes])
        agree = kept.sign() == torch.where(kept.sum(0) >= 0, 1.0, -1.0)
        weighted = torch.stack([change * c for change, c in zip(kept, coefficients, strict=True)])
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _trim(change: torch.Tensor, density: float) -> torch.Tensor:
    flat = change.reshape(-1)
    kept = torch.zeros_like(flat)
    largest = flat.abs().topk(int(density * flat.numel())).indices
    kept[largest] = flat[largest]
    return kept.view_as(change)
