"""What an engine loads is what was promised when the endpoint was put together."""

import shutil
from pathlib import Path

import pytest

from ftray.config.serve import ServeConfig
from ftray.core.errors import DeltaError
from ftray.delta import manifest
from ftray.engine.core import StepEngine
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer
from ftray.registry.local import Registry
from ftray.serve.models import load_models, resolve_models


@pytest.fixture
def registry(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> Registry:
    """`a` and `b`, and `again` with the content of `a`."""
    registry = Registry(tmp_path / "registry")
    template = chat_template_hash(load_tokenizer(tiny_base))
    for name, adapter in (("a", "a"), ("b", "b"), ("again", "a")):
        folder = Path(shutil.copytree(tiny_adapters[adapter], tmp_path / name))
        manifest.write(folder, kind="low_rank", base=base_identity(tiny_base), chat_template_hash=template)
        registry.publish(folder, name)
    return registry


@pytest.fixture
def config(tiny_base: Path, registry: Registry) -> ServeConfig:
    return ServeConfig(base=str(tiny_base), registry=str(registry.root), deltas=["a", "b", "again"])


@pytest.fixture
def engine(tiny_base: Path) -> StepEngine:
    return TorchEngineConfig(kv_cache_tokens=512).build(str(tiny_base))


def test_equal_deltas_are_loaded_once(config: ServeConfig, engine: StepEngine) -> None:
    models = resolve_models(config)
    load_models(engine, models)
    assert engine.deltas() == [models[1].digest, models[2].digest]
    assert models[3].digest == models[1].digest


@pytest.mark.parametrize("name", ["a", "again"])
def test_another_content_in_the_folder_is_refused(
    config: ServeConfig, engine: StepEngine, registry: Registry, name: str
) -> None:
    models = resolve_models(config)
    folder = registry.resolve(name).path
    shutil.rmtree(folder)
    shutil.copytree(registry.resolve("b").path, folder)
    with pytest.raises(DeltaError, match=f"{name}@1") as caught:
        load_models(engine, models)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_is_refused(
    config: ServeConfig, engine: StepEngine, registry: Registry
) -> None:
    models = resolve_models(config)
    (registry.resolve("a").path / manifest.MANIFEST).unlink()
    with pytest.raises(DeltaError, match=manifest.MANIFEST):
        load_models(engine, models)
