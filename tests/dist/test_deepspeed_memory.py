"""Memory of a rank while DeepSpeed takes a model."""

import gc
import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ftray.adapt.full import Full
from ftray.config.recipe import ModelConfig
from ftray.model.build import build_structure, load_weights
from ftray.optim.adamw import AdamW
from ftray.strategy import zero
from ftray.strategy.deepspeed import DeepSpeed
from ftray.strategy.zero import load_deepspeed
from ftray.testing.ranks import on_ranks
from tests.dist.test_memory import SLACK, folder, peak_above

__all__ = ["folder"]  # a fixture
GROUP_BYTES = 16 << 20


def load_and_attach(base: Path, stages: Sequence[int]) -> dict[int, tuple[int, int]]:
    load_deepspeed()
    for module in ("engine", "zero.stage3", "zero.stage_1_and_2"):  # code is no part of what is measured
        importlib.import_module(f"deepspeed.runtime.{module}")
    zero._GROUP_ELEMENTS = GROUP_BYTES // 4
    found = {}
    for stage in stages:
        strategy = DeepSpeed(zero_stage=stage, num_workers=2)  # type: ignore[arg-type]
        model = build_structure(ModelConfig(model_name_or_path=str(base)))
        Full().apply(model, 0)
        strategy.prepare(model, bf16=False)
        before = peak_above()
        load_weights(model, base, "cpu", strategy.keep_part)
        for parameter in model.parameters():
            getattr(
                parameter, "ds_tensor", parameter.detach()
            ).sum()  # what is mapped is there once it is touched
        loading = peak_above(before)
        strategy.attach(model, AdamW().build(dict(model.named_parameters())))
        found[stage] = (loading, peak_above(before))
        strategy.zero.engine.destroy()
        del strategy, model
        gc.collect()
    return found


def test_loading_holds_a_part_and_no_second_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part and a tensor in stage 3, the model in stage 2; what DeepSpeed then sets up is bounded, too.

    That is, of a rank's half: weights, float32 masters, gradients, and once more zeros that it begins with.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is gone
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    whole, largest = sum(sizes), max(sizes)
    for told in on_ranks(2, load_and_attach, folder, (3, 2), fresh=True):
        loading, attached = told[3]
        assert loading <= whole / 2 + largest + SLACK, told
        assert attached <= 4 * whole / 2 + 2 * SLACK, told
        loading, attached = told[2]
        assert loading <= whole + largest + SLACK, told
        assert attached <= whole + 2 * whole / 2 + 2 * GROUP_BYTES + 2 * SLACK, told
