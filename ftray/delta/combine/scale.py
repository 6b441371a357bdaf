"""One delta, stronger or weaker."""

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.delta.combine.base import WeightedSum


@spec
class Scale(WeightedSum):
    """A delta times a number: 1 leaves it as it is, -1 unlearns it (task arithmetic, arXiv:2212.04089)."""

    factor: float = Field(default=1.0, allow_inf_nan=False)
    """What the change is multiplied by."""

    def weights(self, num_deltas: int) -> list[float]:
        """The factor."""
        if num_deltas != 1:
            raise ConfigError(f"scale: takes one delta, not {num_deltas}; use `add` with weights")
        return [self.factor]
