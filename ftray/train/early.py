"""Early stopping by the validation loss, as transformers' `EarlyStoppingCallback` counts."""

import dataclasses
import math

from ftray.config.train import TrainConfig
from ftray.train.checkpoint import State


def after_validation(settings: TrainConfig, state: State, eval_loss: float) -> State:
    """The state after a validation, with the lowest loss so far.

    One without enough gain over the best before it counts against the patience, if it is one of each `eval_steps`;
    that of a run's or a segment's end is not, nor is a second one of the same step. A loss that is not finite is
    no gain and never the best.
    """
    best, is_finite = state.best_eval_loss, math.isfinite(eval_loss)
    counts = state.eval_loss is None and settings.eval_steps and state.step % settings.eval_steps == 0
    is_gain = is_finite and (best is None or best - eval_loss > settings.early_stopping_threshold)
    without = state.evals_without_gain
    return dataclasses.replace(
        state,
        eval_loss=eval_loss,
        best_eval_loss=eval_loss if is_finite and (best is None or eval_loss < best) else best,
        evals_without_gain=(0 if is_gain else without + 1) if counts else without,
    )


def is_over(settings: TrainConfig, state: State) -> bool:
    """True if the patience is used up."""
    patience = settings.early_stopping_patience
    return patience is not None and state.evals_without_gain >= patience
