"""Learning rate over a run, as a factor of the base rate; the numbers are those of `transformers.get_scheduler`.

A schedule is a pure function of (step, progress): progress is the fraction of the run that is done, by steps or
by the clock, whichever is further. It is never restored from a checkpoint.
"""

import math
from typing import Literal, Protocol

from pydantic import Field

from ftray.core.spec import spec


class Schedule(Protocol):
    """Factor of the learning rate."""

    @property
    def depends_on_length(self) -> bool:
        """True if a longer run would have had other rates from the start; it cannot be made longer later."""
        ...

    def scale(self, step: int, progress: float) -> float:
        """Factor at optimiser step `step` (from 0), `progress` in [0, 1]."""
        ...


@spec
class _Warmup:
    """Linear warm-up, then the shape of the subclass."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly; as in transformers, the first step has the lowest."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the run over which it rises, if `warmup_steps` is 0."""

    @property
    def depends_on_length(self) -> bool:
        """The shape is laid out over the run."""
        return True

    def scale(self, step: int, progress: float) -> float:
        """Warm-up, then the shape over the rest of the run."""
        # A run's length in steps follows from where it stands; by the clock it is an estimate that gets better.
        total = max(step + 1, round(step / progress)) if step and progress > 0 else None
        warmup = self.warmup_steps
        if not warmup and self.warmup_ratio:
            warmup = 1 if total is None else math.ceil(total * self.warmup_ratio)
        if step < warmup:
            return self.rise(step / warmup)
        if not warmup or total is None or step == 0:
            return self.shape(min(1.0, progress))
        return self.shape(min(1.0, (step - warmup) / max(1, total - warmup)))

    def rise(self, done: float) -> float:
        """Factor when the fraction `done` of the warm-up is over."""
        return done

    def shape(self, done: float) -> float:
        """Factor when the fraction `done` of the run after warm-up is over."""
        raise NotImplementedError


@spec
class Constant(_Warmup):
    """The base rate throughout."""

    @property
    def depends_on_length(self) -> bool:
        """Only if the warm-up is a fraction of the run."""
        return self.warmup_ratio > 0 and self.warmup_steps == 0

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
        return self.min_ratio + (1.0 - self.min_ratio) * _half_cosine(done)


@spec
class WarmupStableDecay(_Warmup):
    """Warm-up, a plateau, then down to `min_ratio` (Hu et al., arXiv:2404.06395)."""

    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the run after warm-up, at its end, over which the rate falls."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """How it falls."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Factor at the end, and where warm-up begins."""

    def rise(self, done: float) -> float:
        """From `min_ratio`."""
        return self.min_ratio + (1.0 - self.min_ratio) * done

    def shape(self, done: float) -> float:
        """Plateau, then the fall."""
        fallen = 1.0 - (1.0 - done) / self.decay_ratio
        if fallen <= 0:
            return 1.0
        fall = {"linear": 1.0 - fallen, "cosine": _half_cosine(fallen), "1-sqrt": 1.0 - math.sqrt(fallen)}
        return self.min_ratio + (1.0 - self.min_ratio) * fall[self.decay_type]


def _half_cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))
