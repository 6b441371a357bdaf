"""Early stopping by the validation loss, as transformers' `EarlyStoppingCallback` counts."""

import dataclasses

from ftray.config.recipe import TrainConfig
from ftray.train.checkpoint import State


def after_validation(settings: TrainConfig, state: State, eval_loss: float) -> State:
    """The state after a validation: one without enough gain over the best so far counts against the patience.

    `state.best_eval_loss` is the lowest of the validations before this one. A loss that is not a number is no gain.
    """
    best = state.best_eval_loss
    is_gain = best is None or best - eval_loss > settings.early_stopping_threshold
    return dataclasses.replace(state, evals_without_gain=0 if is_gain else state.evals_without_gain + 1)


def is_over(settings: TrainConfig, state: State) -> bool:
    """True if the patience is used up."""
    patience = settings.early_stopping_patience
    return patience is not None and state.evals_without_gain >= patience
