"""Fused norms and gated units change nothing but rounding, and leave alone what they do not know."""

from pathlib import Path

import pytest
import torch

from ftray.model.build import load_model
from ftray.model.fuse import GatedLinear, SwiGLU, fuse
from ftray.model.linear import CastLinear
from ftray.testing.tiny import tiny_base

IDS = torch.randint(2, 250, (1, 40), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(
    base: Path, *, fused: bool, bf16: bool
) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    model = load_model(base).requires_grad_(True)
    taken = fuse(model) if fused else 0
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], taken


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_float32_is_equal(architecture: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path, architecture)
    loss, gradients, taken = loss_and_gradients(base, fused=True, bf16=False)
    plain, expected, _ = loss_and_gradients(base, fused=False, bf16=False)
    norms = 2 * (4 if architecture == "qwen3" else 2) + 1
    assert taken == norms + 2  # and a gated unit in each of the two layers
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    for one, two in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_autocast_is_as_near_to_float32(architecture: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path, architecture)
    _, exact, _ = loss_and_gradients(base, fused=False, bf16=False)
    errors = []
    for fused in (True, False):
        _, gradients, _ = loss_and_gradients(base, fused=fused, bf16=True)
        pairs = zip(gradients, exact, strict=True)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    assert errors[0] < 1.5 * errors[1], errors


def test_other_architectures_stay_as_they_are(tmp_path: Path) -> None:
    assert fuse(load_model(tiny_base(tmp_path, "gpt2"))) == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_behind_a_gated_unit_keeps_nothing(bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(1, 6, 40, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(24, 40, generator=generator).requires_grad_()
    offset = torch.randn(24, generator=generator).requires_grad_() if bias else None
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    inputs = [tensor for tensor in (gate, up, weight, offset) if tensor is not None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = GatedLinear.apply(gate, up, weight, offset, dtype)
    assert {id(tensor) for tensor in kept} <= {id(tensor) for tensor in inputs}
    found = torch.autograd.grad(y.square().sum(), inputs)
    plain = CastLinear.apply(SwiGLU.apply(gate, up), weight, offset, dtype)
    expected = torch.autograd.grad(plain.square().sum(), inputs)
    for one, two in zip((y, *found), (plain, *expected), strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_the_layer_behind_a_gated_unit_is_still_a_linear_layer(tmp_path: Path) -> None:
    model = load_model(tiny_base(tmp_path, "llama"))
    plain = model(IDS).logits
    fuse(model)
    down = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, down.in_features)
    assert torch.equal(down(x), torch.nn.functional.linear(x, down.weight))
    seen = []
    down.register_forward_pre_hook(lambda _, inputs: seen.append([tuple(one.shape) for one in inputs]))
    torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-5, atol=1e-5)
    assert seen == [[(1, 40, down.in_features)]], "a hook sees the layer's one input"
