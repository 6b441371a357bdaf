"""Merged deltas are whole weights that plain transformers loads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftray.adapt.lora import load_adapter
from ftray.core.fs import read_json
from ftray.delta.adopt import adopt
from ftray.model.build import load_model
from tests.unit.delta.answers import ARCHITECTURES, Calculate, delta_logits, logits, plain


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_folders_answer_in_plain_transformers(
    bases: Callable[[str], Path], low_rank: Calculate, calculate: Calculate, architecture: str
) -> None:
    base = bases(architecture)
    low = low_rank(base, 1)
    out = calculate("scale", low, base=base, kind="replacement")
    torch.testing.assert_close(delta_logits(base, out), delta_logits(base, low), rtol=1e-4, atol=1e-4)
    half = calculate("scale", low, base=base, kind="replacement", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert read_json(half / "config.json")["dtype"] == "bfloat16"
    assert (delta_logits(base, half) - delta_logits(base, low)).abs().max() < 1.0


def test_factors_of_experts_merge_and_add_up(
    bases: Callable[[str], Path], calculate: Calculate, tmp_path: Path
) -> None:
    """Stacks of experts, whose factors PEFT lays end to end; held to our own layers."""
    from ftray.adapt.lora_experts import wrap_experts
    from ftray.adapt.lora_files import save_adapter
    from ftray.adapt.lora_linear import lora_layers, route_of, wrap

    base, folders = bases("qwen3_moe"), []
    for seed in (1, 2):
        model = load_model(base)
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        wrap_experts(model, targets, wrap(model, ["q_proj"]))
        generator = torch.Generator().manual_seed(seed)
        for layer in lora_layers(model).values():
            layer.add("x", 2 + seed, 0.5)
            for factor in (layer.lora_A["x"], layer.lora_B["x"]):
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
        save_adapter(model, "x", tmp_path / f"peft-{seed}", str(base), r=2 + seed, lora_alpha=(2 + seed) / 2)
        adopt(tmp_path / f"peft-{seed}", str(base), tmp_path / f"delta-{seed}")
        folders.append(tmp_path / f"delta-{seed}")
    added = calculate("add", *folders, base=base)
    merged = calculate("scale", added, base=base, kind="replacement")
    one_by_one = calculate("add", *folders, base=base, kind="replacement")
    again = calculate("scale", merged, base=base, rank=7)
    model = load_model(base, attn="sdpa")

    def served(folder: Path) -> torch.Tensor:
        load_adapter(model, "y", folder)
        route_of(model).active = "y"
        return logits(model)

    torch.testing.assert_close(served(added), logits(plain(merged)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(plain(one_by_one)), logits(plain(merged)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(served(again), served(added), rtol=1e-3, atol=1e-3)
