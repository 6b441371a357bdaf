"""Learning rate over a run, as a factor of the base rate.

A schedule is a pure function of (step, progress): progress is the fraction of the run that is done, by steps or
by the clock, whichever is further. It is never restored from a checkpoint.
"""

import math
from typing import Protocol

from pydantic import Field

from ftray.core.spec import spec


class Schedule(Protocol):
    """Factor of the learning rate."""

    def scale(self, step: int, progress: float) -> float:
        """Factor at optimiser step `step` (from 0), `progress` in [0, 1]."""
        ...


@spec
class _Warmup:
    """Linear warm-up, then the shape of the subclass."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from near zero."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the run over which it rises, if `warmup_steps` is 0."""

    def scale(self, step: int, progress: float) -> float:
        """Warm-up times shape."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1) * self.shape(0.0)
        if not self.warmup_steps and progress < self.warmup_ratio:
            return max(progress / self.warmup_ratio, 1e-3) * self.shape(0.0)
        start = 0.0 if self.warmup_steps else self.warmup_ratio
        return self.shape(min(1.0, (progress - start) / (1.0 - start)))

    def shape(self, done: float) -> float:
        """Factor when the fraction `done` of the run after warm-up is over."""
        raise NotImplementedError


@spec
class Constant(_Warmup):
    """The base rate throughout."""

    def shape(self, done: float) -> float:
        """One."""
        return 1.0


@spec
class Linear(_Warmup):
    """Down to `min_ratio` in a straight line."""

    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Factor at the end."""

    def shape(self, done: float) -> float:
        """Straight line."""
        return 1.0 - (1.0 - self.min_ratio) * done


@spec
class Cosine(_Warmup):
    """Down to `min_ratio` along half a cosine (Loshchilov & Hutter, arXiv:1608.03983)."""

    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Factor at the end."""

    def shape(self, done: float) -> float:
        """Half a cosine."""
        return self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))


@spec
class WarmupStableDecay(_Warmup):
    """Warm-up, a plateau, then a straight line down (Hu et al., arXiv:2404.06395)."""

    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the run, at its end, over which the rate falls."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Factor at the end."""

    def shape(self, done: float) -> float:
        """Plateau, then a line."""
        left = (1.0 - done) / self.decay_ratio
        return 1.0 if left >= 1 else self.min_ratio + (1.0 - self.min_ratio) * left
