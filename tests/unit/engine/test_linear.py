"""Linear layers of the engine give what plain layers and PEFT's sums give, packed or not, native or not."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftray.core.errors import DeltaError
from ftray.engine import linear, lora_slots, native, pointwise, swap
from ftray.engine.lora_slots import Pair, SlotFactors, Stretches

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(params=["native", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing; the native one where it is built."""
    if request.param == "plain":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("the native kernels are not built here; `python -m ftray.engine.native` builds them")
    return str(request.param)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    assert (found.float() - expected.float()).abs().max() <= TOLERANCE[found.dtype] * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_equals_a_plain_one(dtype: torch.dtype, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 100, bias=bias).to(dtype)
    try:
        packed = linear.PackedMultiply(layer.weight.detach(), layer.bias if bias else None)
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"no packed product for {dtype} on this processor ({error})")
    x = torch.randn(1, rows, 48).to(dtype)
    with torch.inference_mode():
        close(packed(x), layer(x))


def test_a_packed_product_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(linear.PlainMultiply):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) * 1.01

    def broken(*_: object) -> None:
        raise RuntimeError("not here")

    weight = torch.randn(8, 16)
    for replacement in (Wrong, broken):
        monkeypatch.setattr(linear, "PackedMultiply", replacement)
        found = linear.fastest(weight, None)
        assert type(found) is linear.PlainMultiply
        close(found(torch.ones(2, 16)), F.linear(torch.ones(2, 16), weight))


def random_pair(rank: int, inputs: int, outputs: int) -> Pair:
    return Pair(torch.randn(rank, inputs) * inputs**-0.5, torch.randn(outputs, rank) * 0.3, 0.5 + rank / 8)


def expected_sum(
    y: torch.Tensor, x: torch.Tensor, held: dict[int, dict[int, Pair]], bounds: list[int], rows: list
) -> torch.Tensor:
    y = y.double().clone()
    for slot, start, stop in rows:
        for part, pair in held.get(slot, {}).items():
            update = x[start:stop].double() @ pair.a_RI.double().T @ pair.b_OR.double().T * pair.scaling
            y[start:stop, bounds[part] : bounds[part + 1]] += update
    return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_of_mixed_ranks_and_targets_add_their_updates(kernels: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    inputs, widths = 50, [80, 64, 10]
    factors = SlotFactors(inputs, widths, 2, dtype, torch.device("cpu"))
    held = {
        0: {0: random_pair(4, inputs, 80), 1: random_pair(4, inputs, 64), 2: random_pair(4, inputs, 10)},
        1: {2: random_pair(40, inputs, 10)},
        3: {0: random_pair(1, inputs, 80), 2: random_pair(7, inputs, 10)},
    }
    for slot, parts in held.items():  # slot 3 and rank 40 make the room grow
        factors.put(slot, factors.prepare(parts))
    rows = [(3, 0, 1), (0, 2, 21), (1, 21, 24), (0, 25, 27), (2, 27, 28), (90, 28, 29)]
    x, y = torch.randn(30, inputs).to(dtype), torch.randn(30, sum(widths)).to(dtype)
    expected = expected_sum(y, x, held, factors.bounds, rows)
    stretches = Stretches.of(rows)
    assert stretches is not None
    untouched = [1, 24, 27, 28, 29]
    before = y[untouched].clone()
    factors.add(y, x, stretches)
    close(y, expected)
    assert torch.equal(y[untouched], before)


def test_a_slot_that_was_cleared_or_filled_again_answers_with_nothing_of_before(kernels: str) -> None:
    torch.manual_seed(2)
    factors = SlotFactors(32, [64], 1, torch.float32, torch.device("cpu"))
    stretches = Stretches.of([(0, 0, 3)])
    assert stretches is not None
    x, zero = torch.randn(3, 32), torch.zeros(3, 64)
    factors.put(0, factors.prepare({0: random_pair(16, 32, 64)}))
    factors.clear(0)
    y = zero.clone()
    factors.add(y, x, stretches)
    assert torch.equal(y, zero)
    second = random_pair(3, 32, 64)
    factors.put(0, factors.prepare({0: second}))
    factors.add(y, x, stretches)
    close(y, expected_sum(zero, x, {0: {0: second}}, [0, 64], stretches.rows))


def test_room_that_is_not_to_be_had_leaves_the_slots_as_they_were(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    factors = SlotFactors(32, [64], 1, torch.float32, torch.device("cpu"))
    held = {0: {0: random_pair(4, 32, 64)}}
    factors.put(0, factors.prepare(held[0]))
    real = torch.Tensor.new_zeros
    for good in (0, 1):  # allocations before the one that fails
        left = iter([True] * good)

        def scarce(
            tensor: torch.Tensor, *size: int, left: Iterator[bool] = left, **options: Any
        ) -> torch.Tensor:
            if next(left, False):
                return real(tensor, *size, **options)
            raise torch.OutOfMemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_zeros", scarce)
            with pytest.raises(torch.OutOfMemoryError):
                factors.put(1, factors.prepare({0: random_pair(40, 32, 64)}))
        stretches = Stretches.of([(0, 0, 3), (1, 3, 5)])
        assert stretches is not None
        x, y = torch.randn(5, 32), torch.zeros(5, 64)
        factors.add(y, x, stretches)
        close(y, expected_sum(torch.zeros(5, 64), x, held, [0, 64], [(0, 0, 3)]))


def test_a_rank_beyond_what_slots_may_hold_is_refused() -> None:
    swapped = swap.Swapped(nn.Sequential(Block()).requires_grad_(False), 2, max_rank=8)
    assert swapped.prepare({"0.q_proj": random_pair(8, 32, 32)})
    with pytest.raises(DeltaError, match=r"`0\.q_proj` has rank 9, more than max_lora_rank: 8"):
        swapped.prepare({"0.q_proj": random_pair(9, 32, 32)})


class Block(nn.Module):
    """Layers as architectures have them: some share their input, one is transposed, two have biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, size, bias=False) for size in (32, 16, 16))
        self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down_proj = nn.Linear(48, 32)
        self.c_proj = Conv1D(20, 32)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)[..., :32]
        y = self.down_proj(self.act_fn(self.gate_proj(y)) * self.up_proj(y))
        return self.c_proj(y)


def test_a_swapped_model_equals_the_model(kernels: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Block()).requires_grad_(False)
    x = torch.randn(1, 9, 32)
    expected = model(x)
    swapped = swap.Swapped(model, 2)
    assert {name: site.part for name, site in swapped.sites.items()} == {
        **{"0.q_proj": 0, "0.k_proj": 1, "0.v_proj": 2, "0.gate_proj": 0, "0.up_proj": 1},
        **{"0.down_proj": 0, "0.c_proj": 0},
    }
    assert not any(isinstance(module, nn.Linear | Conv1D) for module in model.modules())
    with torch.inference_mode():
        close(model(x), expected)
        close(model(2 * x), Block.forward(model[0], 2 * x))  # type: ignore[arg-type]


def test_updates_reach_the_layers_they_are_named_for(kernels: str) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(Block()).requires_grad_(False)
    x = torch.randn(1, 6, 32)
    pairs = {"0.k_proj": random_pair(4, 32, 16), "0.c_proj": random_pair(2, 32, 20)}
    merged = nn.Sequential(Block()).requires_grad_(False)
    merged.load_state_dict(model.state_dict())
    for name, pair in pairs.items():
        weight = merged.get_submodule(name).weight
        update = pair.scaling * pair.b_OR @ pair.a_RI
        weight += update.T if isinstance(merged.get_submodule(name), Conv1D) else update
    plain, adapted = model(x), merged(x)
    swapped = swap.Swapped(model, 2)
    swapped.put(1, swapped.prepare(pairs))
    with torch.inference_mode():
        close(model(x), plain)
        swapped.route.stretches = Stretches.of([(1, 2, 5)])
        close(model(x), torch.cat([plain[:, :2], adapted[:, 2:5], plain[:, 5:]], 1))
        swapped.clear(1)
        close(model(x), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_native_norms_equal_the_models(dtype: torch.dtype, architecture: str) -> None:
    if not native.available():
        pytest.skip("the native kernels are not built here; `python -m ftray.engine.native` builds them")
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = {"llama": LlamaRMSNorm, "gemma3": Gemma3RMSNorm}[architecture](48).to(dtype)
    norm.weight.data = torch.randn(48).to(dtype)
    model = nn.Sequential(norm).requires_grad_(False)
    x = torch.randn(2, 5, 48).to(dtype)
    expected = norm(x)
    assert pointwise.swap_norms(model) == 1
    close(model(x), expected)


def test_what_is_only_called_a_norm_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    assert pointwise.swap_norms(nn.Sequential(OddRMSNorm())) == 0


def test_a_unit_with_another_gate_keeps_its_own() -> None:
    model = nn.Sequential(Block()).requires_grad_(False)
    model[0].act_fn = nn.GELU()
    x = torch.randn(1, 3, 32)
    expected = model(x)
    swap.Swapped(model, 1)
    assert type(model[0]) is Block
    close(model(x), expected)


def test_stretches_are_immutable() -> None:
    stretches = Stretches.of([(0, 0, 1)])
    assert stretches is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        stretches.rows = []  # type: ignore[misc]
    assert Stretches.of([]) is None
    assert lora_slots._TILE % lora_slots._LANES == 0
