"""The mean of deltas."""

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.delta.combine.base import WeightedSum, one_for_each


@spec
class Average(WeightedSum):
    """The mean of deltas, as in model soups (Wortsman et al., arXiv:2203.05482)."""

    coefficients: list[float] | None = None
    """One for each delta, divided by their sum; equal ones if left out."""

    def weights(self, num_deltas: int) -> list[float]:
        """The coefficients over their sum."""
        found = one_for_each(self.coefficients, num_deltas)
        if sum(found) == 0:
            raise ConfigError(f"weights: {found} add up to 0; a mean needs another sum")
        return [value / sum(found) for value in found]
