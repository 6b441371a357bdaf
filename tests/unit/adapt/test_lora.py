"""Our LoRA against plain `peft`: files and logits both ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftray.adapt.lora import TRAINED, LoRA, load_adapter, lora_layers, unload_adapter
from ftray.core.errors import ConfigError, DeltaError
from ftray.core.fs import read_json, write_json
from ftray.model.build import load_model
from ftray.testing import tiny

IDS = torch.randint(2, 250, (1, 23), generator=torch.Generator().manual_seed(0))
DENSE = [name for name in tiny.ARCHITECTURES if name not in ("mixtral", "qwen3_moe")]


@pytest.fixture(scope="module", params=DENSE)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_base(tmp_path_factory.mktemp("base") / request.param, request.param)


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)


@torch.no_grad()
def test_ours_loads_in_peft(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    adapt = LoRA(r=4, lora_alpha=12)
    adapt.apply(model, seed=0)
    randomise(model)
    adapt.save(model, model.named_parameters(), tmp_path / "delta", str(base))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "delta").eval()
    ours, theirs = model(IDS).logits, peft(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    model.ftray_route.active = None
    assert (model(IDS).logits - theirs).abs().max() > 0.1, "the adapter must change something"


@torch.no_grad()
def test_peft_loads_in_ours_and_leaves_again(base: Path, tmp_path: Path) -> None:
    folder = tiny.random_adapter(base, tmp_path / "peft", r=3)
    model = load_model(base)
    before = model(IDS).logits
    load_adapter(model, "acme", folder)
    model.ftray_route.active = "acme"
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    torch.testing.assert_close(model(IDS).logits, peft(IDS).logits, rtol=1e-4, atol=1e-4)
    unload_adapter(model, "acme")
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_segments_equal_the_adapters_apart(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    model = load_model(tiny_base)
    for name, folder in tiny_adapters.items():
        load_adapter(model, name, folder)
    route = model.ftray_route
    bounds = torch.tensor([0, 5, 14, 23], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(9), torch.arange(9)])[None]
    segments = [("a", 0, 5), (None, 5, 14), ("b", 14, 23)]
    with route.use(segments=segments):
        mixed = model(IDS, position_ids=positions, cu_seq_lens_q=bounds).logits
    for name, start, stop in segments:
        with route.use(active=name):
            alone = model(IDS[:, start:stop]).logits
        torch.testing.assert_close(mixed[:, start:stop], alone, rtol=1e-4, atol=1e-4)


def test_segments_have_the_gradients_of_the_adapters_apart(
    tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    def gradients(segmented: bool) -> list[torch.Tensor]:
        model = load_model(tiny_base)
        for name, folder in tiny_adapters.items():
            load_adapter(model, name, folder)
        layer = lora_layers(model)["model.layers.0.mlp.down_proj"]
        factors = [layer.lora_A["a"], layer.lora_B["b"]]
        for factor in factors:
            factor.requires_grad_(True)
        bounds = torch.tensor([0, 10, 23], dtype=torch.int32)
        positions = torch.cat([torch.arange(10), torch.arange(13)])[None]
        if segmented:
            with model.ftray_route.use(segments=[("a", 0, 10), ("b", 10, 23)]):
                model(IDS, position_ids=positions, cu_seq_lens_q=bounds).logits.square().sum().backward()
        else:
            for name, start, stop in (("a", 0, 10), ("b", 10, 23)):
                with model.ftray_route.use(active=name):
                    model(IDS[:, start:stop]).logits.square().sum().backward()
        return [factor.grad for factor in factors if factor.grad is not None]

    for together, apart in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-3)


def test_initialisation_depends_on_name_and_seed_only(tiny_base: Path) -> None:
    few, many, other = load_model(tiny_base), load_model(tiny_base), load_model(tiny_base)
    LoRA(r=4, target_modules=["q_proj"]).apply(few, seed=5)
    LoRA(r=4).apply(many, seed=5)
    LoRA(r=4).apply(other, seed=6)
    key = "model.layers.1.self_attn.q_proj"
    assert len(lora_layers(few)) == 2 and len(lora_layers(many)) == 14
    assert torch.equal(lora_layers(few)[key].lora_A[TRAINED], lora_layers(many)[key].lora_A[TRAINED])
    assert not torch.equal(lora_layers(many)[key].lora_A[TRAINED], lora_layers(other)[key].lora_A[TRAINED])
    trainable = {name for name, p in many.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)


def test_target_that_matches_nothing_lists_near_misses(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"'q_porj' matches no linear layer; near: .*q_proj"):
        LoRA(target_modules=["q_porj"]).apply(load_model(tiny_base), seed=0)


def changed(folder: Path, source: Path, config: object) -> Path:
    """An adapter folder with the weights of another and this configuration."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", config)
    (folder / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "use_dora"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("peft_type", "IA3", "only LORA"),
        ("bias", "all", "bias"),
        ("init_lora_weights", "pissa", "init_lora_weights='pissa' is not plain LoRA"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights"),
        ("init_lora_weights", "olora", "init_lora_weights"),
        ("init_lora_weights", "corda", "init_lora_weights"),
        ("init_lora_weights", "loftq", "init_lora_weights"),
        ("init_lora_weights", "lora_ga", "init_lora_weights"),
        ("alpha_pattern", {"q_proj": 4}, "alpha_pattern"),
        ("use_qalora", True, "use_qalora"),
        ("arrow_config", {"top_k": 3}, "arrow_config"),
        ("kasa_config", {"beta": 1e-4}, "kasa_config"),
        ("monteclora_config", {"n": 1}, "monteclora_config"),
        ("velora_config", {"num_groups": 2}, "velora_config"),
        ("lora_bias", True, "lora_bias"),
        ("a_variant_of_next_year", True, "a_variant_of_next_year=True is not plain LoRA"),
        ("lora_alpha", "8", "lora_alpha: '8' is refused"),
        ("lora_alpha", float("nan"), "lora_alpha: nan is refused"),
        ("lora_alpha", None, "lora_alpha: None is refused"),
        ("r", 0, "r: 0 is refused"),
        ("r", "4", "r: '4' is refused"),
        ("r", 5, r"has rank 4, adapter_config.json says \[5\]"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern.q_proj: 0 is refused"),
        ("use_rslora", "no", "use_rslora: 'no' is refused"),
    ],
)
def test_settings_that_are_not_plain_lora_are_one_line(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path, key: str, value: object, message: str
) -> None:
    config = read_json(tiny_adapters["a"] / "adapter_config.json") | {key: value}
    model = load_model(tiny_base)
    with pytest.raises(DeltaError, match=message) as raised:
        load_adapter(model, "x", changed(tmp_path, tiny_adapters["a"], config))
    assert "\n" not in str(raised.value) and not lora_layers(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORA", "r": 4}, "lora_alpha: missing"),
        ({"peft_type": "LORA", "lora_alpha": 4}, "r: missing"),
        ([1, 2], "holds no settings"),
        ("LORA", "holds no settings"),
        (None, "holds no settings"),
    ],
)
def test_a_configuration_without_its_settings_is_one_line(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path, config: object, message: str
) -> None:
    with pytest.raises(DeltaError, match=message):
        load_adapter(load_model(tiny_base), "x", changed(tmp_path, tiny_adapters["a"], config))


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "mica"},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"lora_dropout": 0.5, "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_what_peft_calls_plain_has_its_logits(
    tiny_base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    targets = ["q_proj", "v_proj", "up_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    peft.save_pretrained(str(tmp_path))
    model = load_model(tiny_base)
    load_adapter(model, "x", tmp_path)
    model.ftray_route.active = "x"
    torch.testing.assert_close(model(IDS).logits, peft(IDS).logits, rtol=1e-4, atol=1e-4)


def test_adapter_of_another_base_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    other = tiny.tiny_base(tmp_path / "other", hidden_size=32, num_attention_heads=2)
    folder = tiny.random_adapter(other, tmp_path / "adapter")
    model = load_model(tiny_base)
    with pytest.raises(DeltaError, match="another base"):
        load_adapter(model, "x", folder)
    assert not lora_layers(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda factor: torch.tensor(1.0),
        lambda factor: factor[None],
        lambda factor: factor.int(),
        lambda factor: factor.to(torch.complex64),
        lambda factor: factor.to(torch.float8_e4m3fn),
    ],
)
def test_tensors_of_odd_shapes_and_types_are_the_adapters_fault(
    tiny_base: Path, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    folder = tiny.random_adapter(tiny_base, tmp_path / "odd")
    weights = folder / "adapter_model.safetensors"
    save_file({name: change(factor) for name, factor in load_file(weights).items()}, weights)
    with pytest.raises(DeltaError, match="has factors") as raised:
        load_adapter(load_model(tiny_base), "odd", folder)
    assert "\n" not in str(raised.value)
