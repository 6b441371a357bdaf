"""Sums, means and points between deltas, against PEFT and plain torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ftray.core.fs import read_json
from tests.unit.delta.answers import ARCHITECTURES, Calculate, delta_logits, logits, plain


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sum_of_factors_is_exact(
    bases: Callable[[str], Path], low_rank: Calculate, calculate: Calculate, architecture: str
) -> None:
    base = bases(architecture)
    a, b = low_rank(base, 1), low_rank(base, 2, r=6)
    out = calculate("add", a, b, base=base, coefficients=[0.75, -0.5])
    config = read_json(out / "adapter_config.json")
    assert config["r"] == config["lora_alpha"] == 10
    model = plain(base)
    with torch.no_grad():
        for folder, weight in ((a, 0.75), (b, -0.5)):
            peft = PeftModel.from_pretrained(plain(base), str(folder)).merge_and_unload()
            mine = dict(peft.named_parameters())
            for (name, p), start in zip(model.named_parameters(), plain(base).parameters(), strict=True):
                p += weight * (mine[name] - start)
    torch.testing.assert_close(delta_logits(base, out), logits(model), rtol=1e-4, atol=1e-4)


def test_linear_combinations_are_those_of_peft(base: Path, low_rank: Calculate, calculate: Calculate) -> None:
    """`cat` is PEFT's exact one; its `linear` is of the factors and far from the sum of the deltas."""
    a, b = low_rank(base, 1), low_rank(base, 2)
    out = calculate("add", a, b, base=base, coefficients=[0.3, 0.6])
    model = PeftModel.from_pretrained(plain(base), str(a), adapter_name="a")
    model.load_adapter(str(b), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.6], "cat", combination_type="cat")
    model.set_adapter("cat")
    ours = delta_logits(base, out)
    torch.testing.assert_close(ours, logits(model.eval()), rtol=1e-4, atol=1e-4)
    model.add_weighted_adapter(["a", "b"], [0.3, 0.6], "linear", combination_type="linear")
    model.set_adapter("linear")
    assert (ours - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("method", "settings", "weights"),
    [
        ("scale", {"factor": -0.5}, [-0.5]),
        ("interpolate", {"alpha": 0.25}, [0.25]),
        ("interpolate", {"alpha": 0.25}, [0.75, 0.25]),
        ("average", {}, [1 / 3, 1 / 3, 1 / 3]),
        ("average", {"coefficients": [1.0, 3.0]}, [0.25, 0.75]),
        ("add", {"coefficients": [2.0, -1.0]}, [2.0, -1.0]),
    ],
)
def test_whole_weights_are_combined_tensor_by_tensor(
    base: Path, whole: Calculate, calculate: Calculate, method: str, settings: Any, weights: list[float]
) -> None:
    folders = [whole(base, seed) for seed in range(len(weights))]
    out = calculate(method, *folders, base=base, **settings)
    start, made = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert made.keys() == start.keys()
    tuned = [load_file(folder / "model.safetensors") for folder in folders]
    for name, weight in start.items():
        expected = weight + sum(w * (one[name] - weight) for w, one in zip(weights, tuned, strict=True))
        torch.testing.assert_close(made[name], expected, rtol=1e-5, atol=1e-6)
    assert delta_logits(base, out).isfinite().all()


def test_factors_and_whole_weights_add_up(
    base: Path, low_rank: Calculate, whole: Calculate, calculate: Calculate
) -> None:
    low, high = low_rank(base, 1), whole(base, 2)
    out = calculate("add", low, high, base=base)
    merged = load_file(calculate("scale", low, base=base, kind="replacement") / "model.safetensors")
    start, tuned = load_file(base / "model.safetensors"), load_file(high / "model.safetensors")
    for name, made in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(made, merged[name] + tuned[name] - start[name], rtol=1e-5, atol=1e-5)
