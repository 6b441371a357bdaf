"""Between the base and a delta, or between two deltas."""

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.delta.combine.base import WeightedSum


@spec
class Interpolate(WeightedSum):
    """A point on the line from the base to a delta (WiSE-FT, Wortsman et al., arXiv:2109.01903), or between two."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """0: the base, or the first delta; 1: the delta, or the second."""

    def weights(self, num_deltas: int) -> list[float]:
        """`[alpha]`, or `[1 - alpha, alpha]`."""
        if num_deltas not in (1, 2):
            raise ConfigError(f"interpolate: takes one delta or two, not {num_deltas}; use `average`")
        return [1 - self.alpha, self.alpha][-num_deltas:]
