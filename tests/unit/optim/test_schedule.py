"""Schedules against `transformers.get_scheduler`."""

import math
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from ftray.core.spec import build_piece

TOTAL = 40


def theirs(name: str, warmup: int, total: int = TOTAL, **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=settings or None)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def ours(total: int = TOTAL, **settings: Any) -> list[float]:
    schedule = build_piece("lr_scheduler", settings)
    return [schedule.scale(step, step / total) for step in range(total)]


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("total", [9, 40, 1000])
@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine"])
def test_equals_transformers_under_its_names(name: str, warmup: int, total: int) -> None:
    assert ours(total, type=name, warmup_steps=warmup) == pytest.approx(
        theirs(name, warmup, total), abs=1e-12
    )


@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.25])
def test_warmup_ratio_is_rounded_up_as_there(ratio: float) -> None:
    expected = theirs("cosine", math.ceil(TOTAL * ratio))
    assert ours(type="cosine", warmup_ratio=ratio) == pytest.approx(expected, abs=1e-12)


def test_cosine_with_a_floor() -> None:
    expected = theirs("cosine_with_min_lr", 4, min_lr_rate=0.1)
    assert ours(type="cosine_with_min_lr", warmup_steps=4, min_ratio=0.1) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_warmup_stable_decay(decay_type: str, floor: float) -> None:
    expected = theirs("warmup_stable_decay", 8, num_decay_steps=8, decay_type=decay_type, min_lr_ratio=floor)
    found = ours(type="wsd", warmup_steps=8, decay_ratio=0.25, decay_type=decay_type, min_ratio=floor)
    assert found == pytest.approx(expected, abs=1e-12)


def test_constant_is_constant() -> None:
    assert ours(type="constant") == [1.0] * TOTAL


def test_the_clock_also_ends_a_warmup() -> None:
    """Progress by time: steps come unevenly, the rate rises and then falls to nearly nothing."""
    schedule = build_piece("lr_scheduler", {"type": "linear", "warmup_ratio": 0.2})
    progress = [(step / 100) ** 1.3 for step in range(100)]
    rates = [schedule.scale(step, done) for step, done in enumerate(progress)]
    top = rates.index(max(rates))
    assert 0.1 < progress[top] < 0.3 and rates[top] > 0.9 and rates[-1] < 0.05
    assert rates[top:] == sorted(rates[top:], reverse=True)
