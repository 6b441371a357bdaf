"""Deltas laid on top of each other."""

from ftray.core.spec import spec
from ftray.delta.combine.base import WeightedSum, one_for_each


@spec
class Add(WeightedSum):
    """The weighted sum of deltas (task arithmetic, Ilharco et al., arXiv:2212.04089)."""

    coefficients: list[float] | None = None
    """One for each delta; 1 for all if left out."""

    def weights(self, num_deltas: int) -> list[float]:
        """The coefficients."""
        return one_for_each(self.coefficients, num_deltas)
