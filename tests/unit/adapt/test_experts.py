"""LoRA on the experts of a mixture against plain `peft`, and the refusals where experts would be skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ftray.adapt.lora import LoRA, load_adapter, lora_layers, unload_adapter
from ftray.adapt.lora_experts import ExpertFactors
from ftray.config.recipe import ModelConfig
from ftray.core.errors import ConfigError, DeltaError
from ftray.core.fs import read_json, write_json
from ftray.core.spec import parse
from ftray.model.build import build_structure, load_model
from ftray.testing import tiny

IDS = torch.randint(2, 250, (1, 23), generator=torch.Generator().manual_seed(0))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SHARED = {
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 9,
    "intermediate_size": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "shared", "gpt_oss"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plain mixtures, one with a shared expert, one with transposed stacks, biases and a gate of its own."""
    others = {"shared": SHARED, "gpt_oss": GPT_OSS}
    name = request.param
    folder = tmp_path_factory.mktemp("moe") / name
    return tiny.tiny_base(folder, "llama" if name in others else name, **others.get(name, {}))


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def randomise(model: torch.nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.1)


def adapted(base: Path, **settings: Any) -> tuple[Any, LoRA]:
    model = load_model(base)
    adapt = parse(LoRA, {"r": 3, "lora_alpha": 6, "target_parameters": EXPERTS} | settings)
    adapt.apply(model, seed=0)
    return model, adapt


@torch.no_grad()
@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "gate_up", "down"])
def test_ours_loads_in_peft(targets: list[str], base: Path, tmp_path: Path) -> None:
    model, adapt = adapted(base, target_parameters=targets)
    before = model(IDS).logits
    torch.testing.assert_close(before, plain(base)(IDS).logits, rtol=1e-5, atol=1e-5)
    randomise(model)
    adapt.save(model, model.named_parameters(), tmp_path / "delta", str(base))
    peft = PeftModel.from_pretrained(plain(base), tmp_path / "delta").eval()
    torch.testing.assert_close(model(IDS).logits, peft(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (model(IDS).logits - before).abs().max() > 0.1
    again = load_model(base)
    load_adapter(again, "again", tmp_path / "delta")
    again.ftray_route.active = "again"
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    unload_adapter(again, "again")
    assert torch.equal(again(IDS).logits, before)


@torch.no_grad()
def test_peft_loads_in_ours(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS)
    peft = get_peft_model(plain(base), config)
    randomise(peft)
    peft.save_pretrained(str(tmp_path))
    model = load_model(base)
    load_adapter(model, "acme", tmp_path)
    model.ftray_route.active = "acme"
    torch.testing.assert_close(model(IDS).logits, peft(IDS).logits, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_peft(base: Path, tmp_path: Path) -> None:
    """Of each expert's factors; a router's choice has no gradient of its own."""
    model, adapt = adapted(base)
    randomise(model)
    adapt.save(model, model.named_parameters(), tmp_path, str(base))
    peft = PeftModel.from_pretrained(plain(base), tmp_path, is_trainable=True)
    for one in (model, peft):
        one(IDS, labels=IDS).loss.backward()
    folder = tmp_path / "grads"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    adapt.save(model, gradients.items(), folder, str(base))
    from safetensors.torch import load_file

    mine = load_file(folder / "adapter_model.safetensors")
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            theirs, ours = parameter.grad, mine.pop(name.replace(".default", ""))
            scale = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale, msg=name)
    assert not mine


@torch.no_grad()
def test_segments_equal_the_adapters_apart(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    for seed, (name, targets) in enumerate({"a": EXPERTS, "b": EXPERTS[1:]}.items()):
        other, adapt = adapted(base, target_parameters=targets)
        randomise(other, seed)
        adapt.save(other, other.named_parameters(), tmp_path / name, str(base))
        load_adapter(model, name, tmp_path / name)
    bounds = torch.tensor([0, 5, 14, 23], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(9), torch.arange(9)])[None]
    segments = [("a", 0, 5), (None, 5, 14), ("b", 14, 23)]
    with model.ftray_route.use(segments=segments):
        mixed = model(IDS, position_ids=positions, cu_seq_lens_q=bounds).logits
    for name, start, stop in segments:
        with model.ftray_route.use(active=name):
            alone = model(IDS[:, start:stop]).logits
        torch.testing.assert_close(mixed[:, start:stop], alone, rtol=1e-4, atol=1e-4)


def test_experts_are_never_left_out_in_silence(base: Path) -> None:
    model = build_structure(ModelConfig(model_name_or_path=str(base)))
    with pytest.raises(
        ConfigError, match=r"experts\.down_proj, experts\.gate_up_proj.* or `\[\]` to leave them"
    ):
        LoRA().apply(model, seed=0)
    with pytest.raises(
        ConfigError, match=r"'experts\.w1' matches no stack of experts; here: experts\.down_proj"
    ):
        LoRA(target_parameters=["experts.w1"]).apply(model, seed=0)
    LoRA(target_parameters=[]).apply(model, seed=0)
    assert not any(isinstance(layer, ExpertFactors) for layer in lora_layers(model).values())


def test_what_peft_would_refuse_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora_dropout: 0\.1 cannot be applied to experts"):
        parse(LoRA, {"lora_dropout": 0.1, "target_parameters": EXPERTS})


def test_a_dense_model_has_no_experts_to_name(tiny_base: Path) -> None:
    LoRA().apply(load_model(tiny_base), seed=0)
    with pytest.raises(ConfigError, match=r"matches no stack of experts; here: none"):
        LoRA(target_parameters=EXPERTS).apply(load_model(tiny_base), seed=0)


def test_an_adapter_of_another_number_of_experts_is_refused(base: Path, tmp_path: Path) -> None:
    model, adapt = adapted(base)
    adapt.save(model, model.named_parameters(), tmp_path, str(base))
    config = read_json(tmp_path / "adapter_config.json")
    write_json(tmp_path / "adapter_config.json", config | {"r": 6})
    with pytest.raises(DeltaError, match=r"has rank 3, adapter_config.json says \[6\]"):
        load_adapter(load_model(base), "x", tmp_path)
    fewer = tiny.tiny_base(tmp_path / "fewer", "mixtral", num_local_experts=8, num_key_value_heads=2)
    write_json(tmp_path / "adapter_config.json", config)
    with pytest.raises(DeltaError, match="the adapter is for another base"):
        load_adapter(load_model(fewer), "x", tmp_path)
