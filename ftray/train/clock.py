"""How far a run is: by steps or by the clock, whichever is further."""

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
        self.max_time_s = limits.max_time_s
        self.strategy = strategy
        self._start = time.monotonic() - state.elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, earlier processes of the same run included."""
        return time.monotonic() - self._start

    def progress(self, step: int) -> float:
        """Fraction done before step `step`, the same on every rank; 1 ends the run."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        if self.max_time_s is None:
            return min(1.0, by_steps)
        fraction: float = self.strategy.share(max(by_steps, self.elapsed_s / self.max_time_s))
        return min(1.0, fraction)
