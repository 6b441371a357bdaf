"""Gradients are added in place only where nobody could tell the difference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ftray.model.accumulate import adds_only

INPUT = torch.ones(3)


class Sum(torch.autograd.Function):
    """The sum of a weight and an input; its backward pass notes what it was told."""

    told: list[bool]

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return weight.sum() + x.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Sum.told.append(adds_only(ctx.weight))
        return grads[0].expand(ctx.weight.shape), grads[0].expand(ctx.weight.shape)


def told(run: Callable[[], Any]) -> bool:
    Sum.told = []
    run()
    (answer,) = Sum.told
    return answer


def weight_with_gradient() -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return weight


def test_a_plain_weight_that_has_a_gradient() -> None:
    weight = weight_with_gradient()
    assert told(lambda: Sum.apply(weight, INPUT).backward())
    weight.grad = None
    assert not told(lambda: Sum.apply(weight, INPUT).backward())


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_whose_gradient_is_waited_for(hook: str) -> None:
    weight = weight_with_gradient()
    handle = getattr(weight, hook)(lambda _: None)
    assert not told(lambda: Sum.apply(weight, INPUT).backward())
    handle.remove()
    assert told(lambda: Sum.apply(weight, INPUT).backward())


def test_a_weight_that_is_computed() -> None:
    weight = weight_with_gradient()
    assert not told(lambda: Sum.apply(weight * 2, INPUT).backward())


@pytest.mark.parametrize("of_the_weight", [False, True])
def test_gradients_that_are_asked_for(of_the_weight: bool) -> None:
    weight, x = weight_with_gradient(), torch.ones(3, requires_grad=True)
    assert not told(lambda: torch.autograd.grad(Sum.apply(weight, x), weight if of_the_weight else x))
