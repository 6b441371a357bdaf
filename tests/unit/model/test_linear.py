"""Linear layers that cast their weight twice give what autocast gives, bit for bit, and keep no copy of it."""

import copy

import pytest
import torch
from torch import nn

from ftray.model.linear import cast_twice


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_equals_autocast(bias: bool, bf16: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.GELU(), nn.Linear(40, 8, bias=bias))
    ours = copy.deepcopy(plain)
    cast_twice(ours)
    found = []
    for model in (plain, ours):
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = model(x)
        y.float().square().sum().backward()
        found.append([y, x.grad, *(parameter.grad for parameter in model.parameters())])
    for one, two in zip(*found, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_keeps_no_copy_of_the_weight() -> None:
    layer = nn.Linear(64, 128, bias=False)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def copies() -> int:
        kept.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            layer(torch.randn(4, 64, requires_grad=True))
        return sum(t.numel() == layer.weight.numel() and t.dtype == torch.bfloat16 for t in kept)

    assert copies() == 1
    cast_twice(layer)
    assert copies() == 0
