"""TIES, against PEFT's and the paper's three steps."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from ftray.delta import manifest
from tests.unit.delta.answers import Calculate, delta_logits, logits, plain


def test_ties_is_pefts(base: Path, low_rank: Calculate, calculate: Calculate) -> None:
    a, b = low_rank(base, 1), low_rank(base, 2)
    out = calculate("ties", a, b, base=base, density=0.4, coefficients=[1.0, 0.5], rank=8)
    model = PeftModel.from_pretrained(plain(base), str(a), adapter_name="a")
    model.load_adapter(str(b), adapter_name="b")
    model.add_weighted_adapter(
        ["a", "b"], [1.0, 0.5], "ties", combination_type="ties_svd", svd_rank=8, density=0.4
    )
    model.set_adapter("ties")
    torch.testing.assert_close(delta_logits(base, out), logits(model.eval()), rtol=1e-3, atol=1e-3)
    assert manifest.read(out).metrics["relative_error"] > 0.1


def ties_by_hand(base: torch.Tensor, tuned: list[torch.Tensor], density: float) -> torch.Tensor:
    """The paper's three steps, value by value."""
    kept = []
    for one in tuned:
        change = (one - base).flatten()
        order = change.abs().argsort(descending=True)[: int(density * len(change))]
        trimmed = torch.zeros_like(change)
        trimmed[order] = change[order]
        kept.append(trimmed)
    out = torch.zeros_like(kept[0])
    for index in range(len(out)):
        values = [one[index] for one in kept]
        sign = 1.0 if sum(values) >= 0 else -1.0
        same = [value for value in values if value * sign > 0]
        out[index] = sum(same) / len(same) if same else 0.0
    return base + out.view_as(base)


def test_ties_of_whole_weights_is_the_papers(base: Path, whole: Calculate, calculate: Calculate) -> None:
    a, b, c = (whole(base, seed) for seed in (1, 2, 3))
    out = calculate("ties", a, b, c, base=base, density=0.3)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = [load_file(folder / "model.safetensors")[name] for folder in (base, a, b, c, out)]
    torch.testing.assert_close(tensors[-1], ties_by_hand(tensors[0], tensors[1:4], 0.3))
