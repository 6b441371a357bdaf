"""What is held as factors of a given rank, and the error that is measured."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ftray.delta import manifest
from tests.unit.delta.answers import Calculate, delta_logits, logits, plain


def test_truncation_is_pefts_svd_and_its_error_is_recorded(
    base: Path, low_rank: Calculate, calculate: Calculate
) -> None:
    a, b = low_rank(base, 1), low_rank(base, 2)
    out = calculate("add", a, b, base=base, rank=3)
    model = PeftModel.from_pretrained(plain(base), str(a), adapter_name="a")
    model.load_adapter(str(b), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "svd", combination_type="svd", svd_rank=3)
    model.set_adapter("svd")
    torch.testing.assert_close(delta_logits(base, out), logits(model.eval()), rtol=1e-3, atol=1e-3)
    delta = manifest.read(out)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    change = sum(layer.get_delta_weight(one) for one in ("a", "b"))
    with torch.no_grad():
        expected = (change - layer.get_delta_weight("svd")).norm() / change.norm()
    assert delta.derivation["relative_errors"][name] == pytest.approx(float(expected), rel=1e-3)
    assert 0.1 < delta.metrics["relative_error"] < 1


def test_extraction_finds_what_is_low_rank_and_measures_what_is_not(
    base: Path, whole: Calculate, calculate: Calculate
) -> None:
    found = calculate("scale", exact := whole(base, 1, rank=3), base=base, rank=3)
    torch.testing.assert_close(delta_logits(base, found), delta_logits(base, exact), rtol=1e-3, atol=1e-3)
    assert manifest.read(found).metrics["relative_error"] < 1e-3
    full = whole(base, 2)
    errors = []
    for rank in (4, 16, 64):
        delta = manifest.read(calculate("scale", full, base=base, rank=rank))
        by_tensor = delta.derivation["relative_errors"]
        assert by_tensor["model.norm.weight"] == by_tensor["model.embed_tokens.weight"] == 1.0
        errors.append(by_tensor["model.layers.0.mlp.up_proj.weight"])
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3
    start, tuned = (load_file(folder / "model.safetensors") for folder in (base, full))
    name = "model.layers.0.mlp.up_proj.weight"
    values = torch.linalg.svdvals(tuned[name] - start[name])
    assert errors[1] == pytest.approx(float(values[16:].norm() / values.norm()), rel=1e-3)


def test_large_changes_are_decomposed_nearly_as_well() -> None:
    from ftray.delta.factors import factorise

    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(1100, 1200, generator=generator), full_matrices=False)
    change = u @ torch.diag(s * torch.exp(-torch.arange(len(s)) / 40)) @ vh
    a, b = factorise(change, 16)
    best = torch.linalg.svdvals(change)[16:].norm()
    assert (change - b @ a).norm() < 1.01 * best
    assert torch.equal(factorise(change, 16)[0], a), "the same every time"
