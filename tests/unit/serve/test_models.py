"""What references mean, and that an engine gets what was promised for them."""

import shutil
from pathlib import Path

import pytest

from ftray.config.serve import ServeConfig
from ftray.core.errors import ConfigError, DeltaError, RegistryError
from ftray.delta import manifest
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer
from ftray.registry.registry import Registry
from ftray.serve import models
from ftray.serve.models import Follower, bring, resolve_models
from ftray.testing import tiny


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


def test_a_name_stands_for_its_newest_version_and_its_aliases(registry: Registry) -> None:
    follower = Follower(registry, lambda folder: None)
    assert [(m.id, m.ref) for m in follower.models("a")] == [("a", "a@1")]
    registry.promote("a@1", "prod")
    registry.publish(registry.resolve("b").path, "a")
    assert [(m.id, m.ref) for m in follower.models("a")] == [("a", "a@2"), ("a@prod", "a@1")]
    assert [(m.id, m.ref) for m in follower.models("a@prod")] == [("a@prod", "a@1")]
    registry.promote("a@2", "prod")
    assert [m.ref for m in follower.models("a@prod")] == ["a@2"]
    registry.rollback("a", "prod")
    assert [m.ref for m in follower.models("a@prod")] == ["a@1"]
    with pytest.raises(RegistryError):
        follower.models("a@canary")


def test_files_are_read_once_for_each_version(registry: Registry) -> None:
    checked: list[Path] = []
    follower = Follower(registry, checked.append)
    for _ in range(3):
        follower.models("a")
        follower.models("a@1")
    assert len(checked) == 1
    registry.promote("a@1", "prod")
    follower.models("a")
    assert len(checked) == 1


def test_only_so_many_checks_are_remembered(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_MAX_CHECKED", 2)
    follower = Follower(registry, lambda folder: None)
    for name in ("a", "b", "again"):
        assert follower.models(name)
    assert list(follower._checked) == ["b@1", "again@1"]


def test_a_delta_of_another_base_is_refused_each_time(
    config: ServeConfig, registry: Registry, tmp_path: Path
) -> None:
    other = tiny.tiny_base(tmp_path / "other", seed=9)
    folder = tiny.random_adapter(other, tmp_path / "foreign")
    template = chat_template_hash(load_tokenizer(other))
    manifest.write(folder, kind="low_rank", base=base_identity(other), chat_template_hash=template)
    registry.publish(folder, "foreign")
    for _ in range(2):
        with pytest.raises(DeltaError, match="foreign@1") as caught:
            resolve_models(ServeConfig(base=config.base, registry=config.registry, deltas=["foreign"]))
        assert "\n" not in str(caught.value)


def test_a_reference_is_listed_once(config: ServeConfig) -> None:
    with pytest.raises(ConfigError, match="twice"):
        resolve_models(ServeConfig(base=config.base, registry=config.registry, deltas=["a", "a"]))


def test_equal_deltas_have_one_digest(config: ServeConfig) -> None:
    base, a, b, again = resolve_models(config)
    assert base.delta is None
    assert a.digest == again.digest != b.digest


@pytest.mark.parametrize("name", ["a", "again"])
def test_another_content_in_the_folder_is_refused(config: ServeConfig, registry: Registry, name: str) -> None:
    model = next(model for model in resolve_models(config) if model.id == name)
    assert bring(registry, model) == str(registry.resolve(name).path)
    folder = registry.resolve(name).path
    shutil.rmtree(folder)
    shutil.copytree(registry.resolve("b").path, folder)
    with pytest.raises(DeltaError, match=f"{name}@1") as caught:
        bring(registry, model)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_is_refused(config: ServeConfig, registry: Registry) -> None:
    model = resolve_models(config)[1]
    (registry.resolve("a").path / manifest.MANIFEST).unlink()
    with pytest.raises(RegistryError, match=manifest.MANIFEST):
        bring(registry, model)
