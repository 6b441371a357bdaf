"""What a validation does to the best so far and to the patience."""

import dataclasses
import math
from typing import Any

import pytest

from ftray.config.train import TrainConfig
from ftray.train.checkpoint import State
from ftray.train.early import after_validation

SETTINGS = TrainConfig(max_steps=100, eval_steps=2, early_stopping_patience=3)


def seen(losses: list[float], first: State | None = None) -> State:
    """The state after validations at every second step."""
    state = first or State()
    for loss in losses:
        state = dataclasses.replace(state, step=state.step + 2, eval_loss=None)
        state = after_validation(SETTINGS, state, loss)
    return state


@pytest.mark.parametrize(
    ("losses", "best", "without_gain"),
    [
        ([1.0, math.nan, 5.0], 1.0, 2),
        ([math.nan, 5.0], 5.0, 0),
        ([math.nan], None, 1),
        ([math.inf, math.nan], None, 2),
        ([0.0, 5.0], 0.0, 1),
        ([0.0, -1.0], -1.0, 0),
    ],
)
def test_the_best_is_the_lowest_finite_one(losses: list[float], best: Any, without_gain: int) -> None:
    state = seen(losses)
    assert (state.best_eval_loss, state.evals_without_gain) == (best, without_gain)


def test_the_end_of_a_segment_and_a_second_look_do_not_count() -> None:
    state = seen([1.0, 2.0])
    again = after_validation(SETTINGS, state, 2.0)
    assert again == state
    between = after_validation(SETTINGS, dataclasses.replace(state, step=5, eval_loss=None), 0.5)
    assert (between.best_eval_loss, between.evals_without_gain) == (0.5, 1)
