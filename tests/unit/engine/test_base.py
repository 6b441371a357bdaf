"""What does not belong to a base is refused at load, in one line, and leaves nothing behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ftray.delta import manifest
from ftray.engine.api import Request, Sampling
from ftray.engine.core import StepEngine
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer
from ftray.registry.registry import Registry
from ftray.testing import tiny
from tests.unit.engine.refused import refused


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> StepEngine:
    return TorchEngineConfig().build(str(tiny_base))


@pytest.fixture
def facts(tiny_base: Path) -> dict[str, Any]:
    template = chat_template_hash(load_tokenizer(tiny_base))
    return {"kind": "low_rank", "base": base_identity(tiny_base), "chat_template_hash": template}


@pytest.fixture
def adapter(tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapters["a"], tmp_path / "adapter"))


def test_its_own_delta_is_taken_from_the_registry(
    engine: StepEngine, adapter: Path, facts: dict[str, Any], tmp_path: Path
) -> None:
    manifest.write(adapter, **facts)
    entry = Registry(tmp_path / "registry").publish(adapter, "mine")
    engine.load_delta("x", str(entry.path))
    engine.unload_delta("x")


def test_another_base(engine: StepEngine, adapter: Path, facts: dict[str, Any], tmp_path: Path) -> None:
    other = tiny.tiny_base(tmp_path / "other", seed=5)
    manifest.write(adapter, **(facts | {"base": base_identity(other)}))
    assert "belongs to base other" in refused(engine, adapter)


def test_another_chat_template(engine: StepEngine, adapter: Path, facts: dict[str, Any]) -> None:
    manifest.write(adapter, **(facts | {"chat_template_hash": "xxh3:" + "1" * 32}))
    assert "chat template" in refused(engine, adapter)


def test_a_changed_file(engine: StepEngine, adapter: Path, facts: dict[str, Any]) -> None:
    manifest.write(adapter, **facts)
    file = adapter / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "adapter_model.safetensors" in refused(engine, adapter)


def test_an_adapted_output_head_that_its_settings_do_not_name(engine: StepEngine, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    for factor, like in (("lora_A", "q_proj.lora_A"), ("lora_B", "q_proj.lora_B")):
        tensor = next(tensor for key, tensor in tensors.items() if like in key)
        shape = (tensor.shape[0], 64) if factor == "lora_A" else (258, tensor.shape[1])
        tensors[f"base_model.model.lm_head.{factor}.weight"] = tensor.new_zeros(shape)
    save_file(tensors, adapter / "adapter_model.safetensors")
    plain = engine.generate([Request(id="r", prompt_ids=[9, 8], sampling=Sampling(max_tokens=4))])[0]
    assert "lm_head.lora_A.weight` is not used" in refused(engine, adapter)
    again = engine.generate([Request(id="r", prompt_ids=[9, 8], sampling=Sampling(max_tokens=4))])[0]
    assert again.token_ids == plain.token_ids


def test_no_adapter_at_all(engine: StepEngine, tmp_path: Path) -> None:
    assert "adapter_config.json" in refused(engine, tmp_path)
