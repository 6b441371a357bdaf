"""The parity certificate: holds for what is served right, and fails for what is not."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ftray.cli.main import main
from ftray.core.errors import DeltaError
from ftray.delta import manifest
from ftray.delta.adopt import adopt, adopt_model
from ftray.delta.parity import TOLERANCES, check_parity
from ftray.engine.hf_generate import HFGenerateConfig
from ftray.engine.lora_slots import Prepared, SlotFactors
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.eval.parity import certify
from ftray.registry.registry import Registry
from ftray.testing import tiny


@pytest.fixture
def delta(tiny_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "delta"
    adopt(tiny.random_adapter(tiny_base, tmp_path / "peft"), str(tiny_base), folder)
    return folder


@pytest.mark.parametrize("engine", [TorchEngineConfig(), HFGenerateConfig()], ids=["torch", "hf_generate"])
def test_a_delta_answers_alike_alone_merged_and_served(tiny_base: Path, delta: Path, engine: Any) -> None:
    parity = certify(delta, str(tiny_base), engine)
    check_parity(parity, manifest.read(delta).digest)
    assert parity.num_prompts == 4 and parity.num_tokens > 150
    assert parity.merged_difference < 1e-4 and parity.served_difference < 1e-4


def test_in_bfloat16_too(tiny_base: Path, delta: Path) -> None:
    parity = certify(delta, str(tiny_base), TorchEngineConfig(dtype="bfloat16"))
    assert 1e-3 < parity.served_difference <= TOLERANCES["bfloat16"]
    check_parity(parity, manifest.read(delta).digest)


def test_whole_weights_too(tiny_base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "hf")
    adopt_model(tmp_path / "hf", str(tiny_base), tmp_path / "whole")
    parity = certify(tmp_path / "whole", str(tiny_base), TorchEngineConfig())
    check_parity(parity, manifest.read(tmp_path / "whole").digest)


def test_publishing_fails_when_an_engine_serves_it_wrong(
    tiny_base: Path,
    delta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The fault is planted: factors land in their slot a little too strong."""
    words = [
        "publish",
        str(delta),
        "tone",
        "--base",
        str(tiny_base),
        "--registry",
        str(tmp_path / "registry"),
    ]
    put = SlotFactors.put

    def put_wrong(self: SlotFactors, slot: int, prepared: Prepared) -> None:
        put(self, slot, dataclasses.replace(prepared, b_E=prepared.b_E * 1.01))

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(SlotFactors, "put", put_wrong)
        main(words)
    assert ended.value.code == 2
    assert "parity: served and alone, log-probabilities differ by" in capsys.readouterr().err
    registry = Registry(tmp_path / "registry")
    assert registry.list() == []
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    parity = registry.resolve("tone").delta.parity
    assert parity is not None and parity.engine == "torch" and parity.served_difference < 1e-3
    assert "alone, merged and served" in capsys.readouterr().out


def test_a_certificate_of_something_else_or_that_does_not_hold_is_refused(
    tiny_base: Path, delta: Path, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    parity = certify(delta, str(tiny_base), TorchEngineConfig())
    registry.publish(delta, "tone", parity=parity)
    for wrong, message in (
        ({"delta": "xxh3:other"}, "is of xxh3:other"),
        ({"merged_difference": 0.02}, "merged and alone"),
        ({"served_difference": float("nan")}, "served and alone"),
    ):
        with pytest.raises(DeltaError, match=message):
            registry.publish(delta, "tone", parity=dataclasses.replace(parity, **wrong))
    assert registry.versions("tone") == [1]
