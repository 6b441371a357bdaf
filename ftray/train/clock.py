"""How far a run is: by steps or tokens, or by the clock, whichever is further."""

import math
import time

from ftray.config.train import TrainConfig
from ftray.strategy.base import Strategy
from ftray.train.checkpoint import State


class Clock:
    """Progress of a run in [0, 1].

    Args:
        limits: the recipe's `train` section.
        num_rows: rows in one epoch.
        strategy: shares rank 0's clock, so that all ranks stop at the same step.
        state: where the run stands when this process begins.
    """

    def __init__(self, limits: TrainConfig, num_rows: int, strategy: Strategy, state: State) -> None:
        self.max_steps = limits.max_steps
        if limits.num_train_epochs is not None:
            self.max_steps = math.ceil(limits.num_train_epochs * num_rows / limits.global_batch_size)
        self.max_tokens = limits.max_tokens
        self.max_time_s = limits.max_time_s
        self.strategy = strategy
        self._start = time.monotonic() - state.elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, earlier processes of the same run included."""
        return time.monotonic() - self._start

    def done(self, state: State) -> int:
        """Tokens of a run that is limited by tokens, else optimiser steps."""
        return state.tokens if self.max_tokens else state.step

    def progress(self, state: State) -> float:
        """Fraction done before the next step, the same on every rank; 1 ends the run."""
        limit = self.max_tokens or self.max_steps
        by_count = self.done(state) / limit if limit else 0.0
        if self.max_time_s is None:
            return min(1.0, by_count)
        fraction: float = self.strategy.share(max(by_count, self.elapsed_s / self.max_time_s))
        return min(1.0, fraction)
