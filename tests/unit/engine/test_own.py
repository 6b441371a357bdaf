"""Deltas that share no batch answer as PEFT or the fine-tuned model does, beside those that do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.core.errors import DeltaError
from ftray.delta import manifest
from ftray.delta.adopt import adopt
from ftray.engine.api import Output, Request, Sampling
from ftray.engine.core import StepEngine
from ftray.engine.hf_generate import HFGenerateConfig
from ftray.engine.own import OwnReader
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.model.build import load_model
from ftray.model.identity import base_identity
from ftray.testing import tiny
from tests.peft_reference import MARGIN, Reference
from tests.unit.engine.refused import refused


def kinds() -> dict[str, Any]:
    """Adapters of kinds other than plain LoRA."""
    import peft

    attention = ["q_proj", "v_proj"]
    return {
        "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=attention),
        "ia3": peft.IA3Config(target_modules=[*attention, "down_proj"], feedforward_modules=["down_proj"]),
        "lokr": peft.LoKrConfig(r=4, target_modules=attention),
        "loha": peft.LoHaConfig(r=2, target_modules=attention),
        "oft": peft.OFTConfig(r=4, oft_block_size=0, target_modules=attention),
        "head": peft.LoraConfig(r=4, target_modules=attention, modules_to_save=["lm_head"]),
    }


def save(base: Path, folder: Path, config: Any, seed: int) -> Path:
    """An adapter whose every tensor is random, saved by PEFT."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapters(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    made = {name: save(tiny_base, root / name, config, 3) for name, config in kinds().items()}
    return made | {"a": tiny_adapters["a"]}


def ask(name: str, delta: str | None, prompt: int) -> Request:
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    return Request(id=name, prompt_ids=list(range(9, 9 + prompt)), delta=delta, sampling=sampling)


@pytest.mark.parametrize(
    "config", [TorchEngineConfig(kv_cache_tokens=2048), HFGenerateConfig()], ids=["torch", "hf"]
)
def test_other_kinds_of_peft_answer_as_peft_does(
    tiny_base: Path, adapters: dict[str, Path], config: Any
) -> None:
    engine: StepEngine = config.build(str(tiny_base))
    for name, folder in adapters.items():
        engine.register_delta(name, str(folder))
    reference = Reference(tiny_base, adapters)
    requests = [
        ask(f"{number}{name}", name, 5 + 9 * number) for number in range(2) for name in (None, *adapters)
    ]
    for request, output in zip(requests, engine.generate(requests), strict=True):
        assert output.error is None
        reference.check(request, output)
    facts = {name: engine.delta_info(name) for name in adapters}
    assert {name: info.kind for name, info in facts.items()} == {
        **{"a": "low_rank", "dora": "lora", "head": "lora"},
        **{name: name for name in ("ia3", "lokr", "loha", "oft")},
    }
    assert [name for name, info in facts.items() if info.mixed_batch] == ["a"]
    assert sum(info.tier == "slot" for info in facts.values() if not info.mixed_batch) == 1
    assert sum(info.tier == "host" for info in facts.values() if not info.mixed_batch) == 0


def test_an_adapted_output_head_is_merged(tmp_path: Path) -> None:
    import peft

    base = tiny.tiny_base(tmp_path / "base", "qwen3")
    folder = save(base, tmp_path / "x", peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), 1)
    engine = TorchEngineConfig(kv_cache_tokens=512).build(str(base))
    engine.load_delta("x", str(folder))
    request = ask("0", "x", 12)
    Reference(base, {"x": folder}).check(request, engine.generate([request])[0])


def replacement(base: Path, folder: Path, **overrides: Any) -> Path:
    """Whole weights of another seed, as a delta."""
    tuned = tiny.tiny_base(folder, seed=7, **overrides)
    for file in tuned.iterdir():
        if file.suffix not in (".safetensors",) and file.name not in (
            "config.json",
            "generation_config.json",
        ):
            file.unlink()
    manifest.write(tuned, kind="replacement", base=base_identity(base))
    return tuned


def test_replacement_weights_answer_beside_the_base(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tuned = replacement(tiny_base, tmp_path / "tuned")
    engine = TorchEngineConfig(kv_cache_tokens=512).build(str(tiny_base))
    engine.load_delta("tuned", str(tuned))
    assert engine.delta_info("tuned").kind == "replacement"
    outputs = engine.generate([ask("0", None, 20), ask("1", "tuned", 20), ask("2", None, 9)])
    for folder, output in ((tiny_base, outputs[0]), (tuned, outputs[1])):
        check(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), 20, output)
    refusing = TorchEngineConfig(kv_cache_tokens=512, max_own_weights=0).build(str(tiny_base))
    with pytest.raises(DeltaError, match="max_own_weights"):
        refusing.load_delta("tuned", str(tuned))


@pytest.mark.parametrize("kind", ["replacement", "ia3"])
def test_only_weights_become_narrow(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """Rotary frequencies in bfloat16 would turn far positions by other angles."""
    model = load_model(tiny_base, dtype="bfloat16")
    if kind == "replacement":
        folder = replacement(tiny_base, tmp_path / "x")
    else:
        adopt(save(tiny_base, tmp_path / "peft", kinds()[kind], 1), str(tiny_base), folder := tmp_path / "x")
    own = OwnReader(tiny_base, model).read(folder, manifest.read(folder), "digest").model
    assert {parameter.dtype for parameter in own.parameters()} == {torch.bfloat16}
    ours, theirs = dict(own.named_buffers()), dict(model.named_buffers())
    assert ours.keys() == theirs.keys() and "model.rotary_emb.inv_freq" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


DYNAMIC = {
    "rope_type": "dynamic",
    "factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", DYNAMIC),
        ("rms_norm_eps", 0.1),
        ("max_position_embeddings", 4096),
        ("hidden_act", "gelu"),
    ],
)
def test_weights_of_another_structure_are_refused(
    tiny_base: Path, tmp_path: Path, field: str, value: Any
) -> None:
    folder = replacement(tiny_base, tmp_path / "x", **{field: value})
    for config in (TorchEngineConfig(kv_cache_tokens=512), HFGenerateConfig()):
        said = refused(config.build(str(tiny_base)), folder)
        assert f"config.json: {field} is" in said and "only weights may differ" in said


def test_names_and_notes_of_own_weights_may_differ(tiny_base: Path, tmp_path: Path) -> None:
    folder = replacement(tiny_base, tmp_path / "x", architectures=["Other"], attention_dropout=0.1)
    engine = TorchEngineConfig(kv_cache_tokens=512).build(str(tiny_base))
    engine.load_delta("x", str(folder))
    assert engine.generate([ask("0", "x", 9)])[0].error is None


def test_own_weights_that_leave_the_paged_attention_fail_alone(tiny_base: Path, tmp_path: Path) -> None:
    engine = TorchEngineConfig(kv_cache_tokens=512).build(str(tiny_base))
    engine.load_delta("x", str(replacement(tiny_base, tmp_path / "x")))
    for model in engine._runner._own.values():  # type: ignore[attr-defined]
        model.set_attn_implementation("sdpa")
    only_prompt = Sampling(max_tokens=0, prompt_logprobs=0)
    scored = Request(id="2", prompt_ids=list(range(9, 18)), delta="x", sampling=only_prompt)
    base, own, score = engine.generate([ask("0", None, 9), ask("1", "x", 9), scored])
    assert base.error is None
    assert own.error == score.error == "the model gave no finite logits"


def check(model: Any, prompt: int, output: Output) -> None:
    ids = [*range(9, 9 + prompt), *output.token_ids]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, prompt - 1 :]
    chosen = logits.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen <= MARGIN).all()


def test_what_cannot_be_merged_is_refused_with_the_reason(tiny_base: Path, tmp_path: Path) -> None:
    import peft

    engine = TorchEngineConfig(kv_cache_tokens=512).build(str(tiny_base))
    prompts = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    folder = save(tiny_base, tmp_path / "prompts", prompts, 1)
    assert "PROMPT_TUNING cannot be merged" in refused(engine, folder)
    # The head of this base is its embedding, so merged the adapter would change both.
    tied = save(tiny_base, tmp_path / "tied", peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), 1)
    assert "other logits" in refused(engine, tied)
    other = tiny.tiny_base(tmp_path / "other", hidden_size=32)
    foreign = save(
        other, tmp_path / "foreign", peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]), 1
    )
    assert "cannot be used" in refused(engine, foreign)


@pytest.mark.parametrize("pattern", ["(a+)+$", ".*proj"])
def test_a_pattern_from_outside_is_never_run(tiny_base: Path, tmp_path: Path, pattern: str) -> None:
    engine = TorchEngineConfig(kv_cache_tokens=512).build(str(tiny_base))
    folder = save(tiny_base, tmp_path / "x", kinds()["ia3"], 1)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": pattern}))
    assert "target_modules is a pattern" in refused(engine, folder)
