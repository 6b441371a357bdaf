"""The parity certificate: holds for what is served right, and fails for what is not."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ftray.cli.main import main
from ftray.core.errors import DeltaError
from ftray.core.fs import read_json, write_json
from ftray.core.spec import dump
from ftray.delta import manifest
from ftray.delta.adopt import adopt, adopt_model
from ftray.delta.parity import TOLERANCES, Parity, check_parity
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


def saved(base: Path, folder: Path, config: Any) -> Path:
    """An adapter of any of PEFT's kinds, all of its own parameters random."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(str(folder))
    return folder


TARGETS = ["q_proj", "v_proj", "down_proj"]
MERGED = {
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM"),
    "modules_to_save": LoraConfig(
        r=4, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", MERGED)
def test_other_kinds_are_published_when_they_are_measured(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.tiny_base(tmp_path / "base", tie_word_embeddings=False)
    adapter = saved(base, tmp_path / "peft", MERGED[kind])
    where = ["--base", str(base), "--registry", str(tmp_path / "registry")]
    with pytest.raises(SystemExit) as ended:
        main(["publish", str(adapter), "other", *where])
    assert ended.value.code == 0, capsys.readouterr().err
    entry = Registry(tmp_path / "registry").resolve("other")
    assert entry.delta.kind == "peft" and entry.delta.parity is not None
    # Merged by our algebra, it is whole weights like any others.
    with pytest.raises(SystemExit) as ended:
        main(["delta", "merge", "other@1", *where, "--out", str(tmp_path / "merged")])
    assert ended.value.code == 0, capsys.readouterr().err
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
        start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        unchanged = start(ids).logits
        alone = PeftModel.from_pretrained(start, str(adapter)).eval()(ids).logits
    torch.testing.assert_close(plain, alone, rtol=1e-4, atol=1e-4)
    assert (unchanged - alone).abs().max() > 0.1


def test_what_cannot_be_merged_is_refused_with_the_reason(tiny_base: Path, tmp_path: Path) -> None:
    prefix = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tied = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    for name, config, message in (
        ("prompt", prefix, "PROMPT_TUNING cannot be merged"),
        ("tied", tied, "ties to"),
    ):
        adopt(saved(tiny_base, tmp_path / f"{name}-peft", config), str(tiny_base), tmp_path / name)
        with pytest.raises(DeltaError, match=message):
            certify(tmp_path / name, str(tiny_base), TorchEngineConfig())


def test_a_certificate_in_an_upload_is_not_believed(tiny_base: Path, tmp_path: Path) -> None:
    adopt(saved(tiny_base, tmp_path / "peft", MERGED["ia3"]), str(tiny_base), tmp_path / "delta")
    digest = manifest.read(tmp_path / "delta").digest
    forged = Parity(
        delta=digest,
        base="xxh3:0",
        engine="torch",
        dtype="float32",
        num_prompts=4,
        num_tokens=9,
        merged_difference=0.0,
        served_difference=0.0,
    )
    write_json(
        tmp_path / "delta" / manifest.MANIFEST,
        read_json(tmp_path / "delta" / manifest.MANIFEST) | {"parity": dump(forged)},
    )
    with pytest.raises(DeltaError, match="has to be merged to be served"):
        Registry(tmp_path / "registry").publish(tmp_path / "delta", "other")
    assert Registry(tmp_path / "registry").publish(tmp_path / "delta", "other", parity=forged).version == 1
