"""The joined node of a frozen layer and its low-rank update against the two written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ftray.adapt.lora_linear import LoRALinear
from ftray.adapt.low_rank import LowRankLinear, Update
from ftray.adapt.route import Route

SCALING = 0.7


def tensors(bias: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    """Input `[2, 5, 12]`, weight, bias, factors of rank 3, and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 12), (8, 12), (8,), (3, 12), (8, 3), (2, 5, 8)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor if bias or number != 2 else None for number, tensor in enumerate(made)]


def written_out(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * SCALING


def joined(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    result: torch.Tensor = LowRankLinear.apply(x, weight, bias, [Update(0, 10, SCALING)], a, b)
    return result


def run(function: object, given: list[torch.Tensor | None], cast: bool = False) -> list[torch.Tensor]:
    """Output and the gradients of input and factors."""
    *inputs, grad = [None if tensor is None else tensor.clone() for tensor in given]
    trained = [inputs[0], inputs[3], inputs[4]]
    for tensor in trained:
        assert tensor is not None
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        output = function(*inputs)  # type: ignore[operator]
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in trained if tensor is not None)]


@pytest.mark.parametrize("bias", [True, False])
def test_equals_both_written_out(bias: bool) -> None:
    given = tensors(bias)
    for one, two in zip(run(joined, given), run(written_out, given), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_autocast_rounds_and_no_more() -> None:
    exact = run(written_out, tensors(True, torch.float64))
    for one, two in zip(run(joined, tensors(True), cast=True), exact, strict=True):
        assert one.dtype in (torch.bfloat16, torch.float32)
        assert float((one.double() - two).norm() / two.norm()) < 0.006


def test_layer_takes_it_only_where_nothing_else_trains() -> None:
    """With a trained base or no gradients base and update are computed apart, to the same numbers."""
    route = Route()
    layer = LoRALinear(nn.Linear(12, 8).requires_grad_(False), route)
    layer.add("a", 3, SCALING)
    route.active = "a"
    nn.init.normal_(layer.lora_B["a"])
    nn.init.normal_(layer.lora_A["a"])
    x = torch.randn(4, 12)
    output = layer(x)
    assert "LowRankLinear" in type(output.grad_fn).__name__
    with torch.no_grad():
        torch.testing.assert_close(layer(x), output)
    layer.weight.requires_grad_(True)
    apart = layer(x)
    assert "LowRankLinear" not in type(apart.grad_fn).__name__
    torch.testing.assert_close(apart, output)
