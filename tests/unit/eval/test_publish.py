"""Every way into a registry measures a delta on the base it names, where that is here and still the same."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ftray.cli.tour import TASKS, Tour
from ftray.core.errors import DeltaError
from ftray.core.fs import read_json, write_json
from ftray.delta import manifest
from ftray.delta.adopt import adopt, adopt_model
from ftray.engine.lora_slots import Prepared, SlotFactors
from ftray.eval.publish import publish
from ftray.registry.registry import Registry
from ftray.testing import tiny


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def trained(base: Path, folder: Path, **model: Any) -> Path:
    """A LoRA delta whose recipe says this of its model."""
    adopt(tiny.random_adapter(base, folder.with_suffix(".peft")), str(base), folder)
    path = folder / manifest.MANIFEST
    write_json(path, read_json(path) | {"recipe": {"model": model}})
    return folder


def test_the_base_of_its_recipe_is_used_while_it_is_there_and_the_same(
    tiny_base: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_base.parent)
    other = tiny.tiny_base(tmp_path / "other", seed=7)
    for path, is_measured in (
        (str(tiny_base), True),
        (tiny_base.name, True),  # relative, as the recipe of a run nearby
        (str(tmp_path / "gone"), False),
        (str(other), False),  # the folder holds another model by now
        ("someone/model", False),  # nothing is fetched for it
        ("", False),
    ):
        delta = trained(tiny_base, tmp_path / f"delta-{len(registry.list())}", model_name_or_path=path)
        found = publish(registry, delta, "tone").delta.parity
        assert (found is not None) == is_measured, path
    assert publish(registry, delta, "tone", base=str(tiny_base)).delta.parity is not None
    assert publish(registry, delta, "tone", base=str(tiny_base), parity=False).delta.parity is None
    with pytest.raises(DeltaError, match="belongs to base"):
        publish(registry, delta, "tone", base=str(other), parity=False)


def test_what_was_trained_from_random_weights_is_its_own_base(
    tiny_base: Path, tmp_path: Path, registry: Registry
) -> None:
    delta = tmp_path / "whole"
    adopt_model(tiny_base, str(tiny_base), delta)
    path = delta / manifest.MANIFEST
    write_json(path, read_json(path) | {"recipe": {"model": {"init": "config"}}})
    found = publish(registry, delta, "start").delta.parity
    assert found is not None and found.delta == manifest.read(delta).digest


def test_without_the_memory_it_is_said_before_anything_is_loaded(
    tiny_base: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = trained(tiny_base, tmp_path / "delta", model_name_or_path=str(tiny_base))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(DeltaError, match=r"comparing takes 0.0 GiB .* --no-parity"):
        publish(registry, delta, "tone")
    assert registry.list() == []


def test_the_walk_publishes_nothing_that_is_served_wrong(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is planted: factors land in their slot a little too strong."""
    monkeypatch.chdir(tmp_path)
    tour = Tour(Path(__file__).parents[3] / "examples/quickstart")
    base = tour.folder / "base" / "delta"
    base.parent.mkdir(parents=True)
    base.symlink_to(tiny_base)
    result = SimpleNamespace(interval=SimpleNamespace(estimate=0.9))
    for task in TASKS:
        tour._deltas[task] = trained(tiny_base, tmp_path / task)
        tour._reports[task] = SimpleNamespace(result=lambda name: result)
    registry = Registry(tour.folder / "registry")
    put = SlotFactors.put

    def put_wrong(self: SlotFactors, slot: int, prepared: Prepared) -> None:
        put(self, slot, dataclasses.replace(prepared, b_E=prepared.b_E * 1.01))

    with monkeypatch.context() as patch, pytest.raises(DeltaError, match="served and alone"):
        patch.setattr(SlotFactors, "put", put_wrong)
        tour._publish()
    assert registry.list() == []
    tour._publish()
    assert {entry.name for entry in registry.list() if entry.delta.parity} == set(TASKS)
