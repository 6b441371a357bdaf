"""The registry: unique versions under concurrency, crashes at any line, strict names, damage named."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ftray.core.errors import DeltaError, RegistryError
from ftray.registry.registry import Registry
from ftray.testing.deltas import weights_delta
from tests.unit.registry.publishers import publish_at_once


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    return weights_delta(tmp_path / "delta", metrics={"eval_loss": 2.0}, lineage={"data": ["xxh3:d"]})


def test_publish_and_resolve(registry: Registry, delta: Path) -> None:
    first = registry.publish(delta, "tone", metrics={"accuracy": 0.9}, lineage={"run": "runs/a"})
    second = registry.publish(delta, "tone", aliases=["prod"])
    assert (first.ref, second.ref) == ("tone@1", "tone@2")
    assert first.digest == second.digest == registry.resolve("tone").digest
    assert registry.resolve("tone").version == 2
    found = registry.resolve("tone@1")
    assert found.delta.metrics == {"eval_loss": 2.0, "accuracy": 0.9}
    assert found.delta.lineage.run == "runs/a" and found.delta.lineage.data == ["xxh3:d"]
    assert registry.resolve("tone@prod").aliases == ("prod",)
    assert [entry.ref for entry in registry.list()] == ["tone@1", "tone@2"]
    assert (delta / "ftray_delta.json").is_file()


def test_published_folder_can_be_published_again(registry: Registry, delta: Path) -> None:
    entry = registry.publish(delta, "tone")
    again = registry.publish(entry.path, "copy", lineage={"parents": [entry.ref]})
    assert again.digest == entry.digest
    assert registry.show("copy").delta.lineage.parents == ["tone@1"]


def test_aliases_switch(registry: Registry, delta: Path) -> None:
    registry.publish(delta, "tone", aliases=["prod"])
    registry.publish(delta, "tone")
    assert registry.resolve("tone@prod").version == 1
    registry.alias("tone", "prod", 2)
    assert registry.resolve("tone@prod").version == 2
    with pytest.raises(RegistryError, match="tone@7: no such version"):
        registry.alias("tone", "prod", 7)
    assert registry.resolve("tone@prod").version == 2


def test_unknown_references_name_near_misses(registry: Registry, delta: Path) -> None:
    with pytest.raises(RegistryError, match="there are no names yet"):
        registry.resolve("tone")
    registry.publish(delta, "tone", aliases=["prod"])
    with pytest.raises(RegistryError, match="did you mean tone"):
        registry.resolve("tonne")
    with pytest.raises(RegistryError, match="did you mean prod"):
        registry.resolve("tone@prd")
    with pytest.raises(RegistryError, match="tone@9: no such version; the newest are: 1"):
        registry.resolve("tone@9")


BAD_NAMES = [
    "",
    ".",
    "..",
    "../tone",
    "a/b",
    "a\\b",
    "a\0b",
    "Tone",
    "töne",
    "%2e%2e",
    "-a",
    "a b",
    "x" * 65,
    "tone\n",
]


@pytest.mark.parametrize("name", [*BAD_NAMES, "base", "tone@1"])
def test_names_are_strict(registry: Registry, delta: Path, name: str) -> None:
    with pytest.raises(RegistryError):
        registry.publish(delta, name)
    assert not registry.root.exists()


@pytest.mark.parametrize("selector", [*BAD_NAMES, "0", "01", "-1", "1.0/..", "٣", "99999999999"])
def test_selectors_are_strict(registry: Registry, delta: Path, selector: str) -> None:
    registry.publish(delta, "tone")
    with pytest.raises(RegistryError):
        registry.resolve(f"tone@{selector}")
    with pytest.raises(RegistryError):
        registry.alias("tone", selector, 1)


def test_refused_alias_publishes_nothing(registry: Registry, delta: Path) -> None:
    with pytest.raises(RegistryError, match="alias"):
        registry.publish(delta, "tone", aliases=["ok", "../bad"])
    assert registry.list() == []


@pytest.mark.parametrize(
    "link", ["tone", "tone/versions", "tone/versions/000001", "tone/states", "tone/states/000001.json"]
)
def test_links_inside_the_registry_are_not_followed(
    registry: Registry, delta: Path, link: str, tmp_path: Path
) -> None:
    other = Registry(tmp_path / "other")
    other.publish(delta, "tone", aliases=["prod"])
    registry.publish(delta, "tone", aliases=["prod"])
    inside = registry.root / link
    inside.rename(tmp_path / "moved")
    inside.symlink_to(other.root / link)
    with pytest.raises(RegistryError):
        registry.resolve("tone@prod")


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "ftray_delta.json", "ftray_version.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_file_is_named_and_others_still_resolve(
    registry: Registry, delta: Path, name: str, damage: str
) -> None:
    entry = registry.publish(delta, "tone")
    registry.publish(delta, "tone")
    path = entry.path / name
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"\xff" + data[1:])
    with pytest.raises(RegistryError, match=rf"tone@1 is damaged: .*{name}"):
        registry.resolve("tone@1")
    assert registry.resolve("tone").version == 2
    assert registry.publish(delta, "tone").version == 3


def test_damaged_delta_is_not_published(registry: Registry, delta: Path) -> None:
    (delta / "adapter_config.json").write_text("{}")
    with pytest.raises(DeltaError, match=r"delta/adapter_config\.json"):
        registry.publish(delta, "tone")
    assert registry.list() == []


def test_old_litter_is_swept_and_young_left(registry: Registry, delta: Path) -> None:
    versions = registry.publish(delta, "tone").path.parent
    old, young = versions / ".tmp-000002-aaaa", versions / ".tmp-000002-bbbb"
    for folder in (old, young):
        folder.mkdir()
        (folder / "part").write_text("x")
    two_days_ago = time.time() - 2 * 86400
    os.utime(old, (two_days_ago, two_days_ago))
    assert registry.publish(delta, "tone").version == 2
    assert not old.exists() and young.exists()
    assert [entry.version for entry in registry.list()] == [1, 2]


def test_concurrent_publishers_get_unique_rising_versions(registry: Registry, delta: Path) -> None:
    assert isinstance(registry.root, Path)
    everything = publish_at_once(registry.root, delta, 5)
    assert [registry.resolve(f"tone@{version}").version for version in everything] == everything
    assert not list(registry.root.rglob(".tmp-*"))


def _lines_of_ftray(on_line: Callable[[], None]) -> Callable[..., Any]:
    """A trace function that calls `on_line` before every line of ftray's own code."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if "ftray" not in frame.f_code.co_filename:
            return None
        if event == "line":
            on_line()
        return trace

    return trace


def _publish_and_die(root: Path, delta: Path, at_line: int) -> int:
    """Publish in a forked child that is killed at its n-th line; returns the child's wait status."""
    pid = os.fork()
    if pid == 0:
        lines = 0

        def on_line() -> None:
            nonlocal lines
            lines += 1
            if lines == at_line:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.settrace(_lines_of_ftray(on_line))
        Registry(root).publish(delta, "tone", aliases=["prod"])
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_killed_publisher_leaves_old_or_new(tmp_path: Path, delta: Path) -> None:
    outcomes: list[tuple[bool, tuple[int, ...], int]] = []
    while not outcomes or outcomes[-1][0]:
        registry = Registry(tmp_path / f"registry-{len(outcomes)}")
        registry.publish(delta, "tone", aliases=["prod"])
        status = _publish_and_die(registry.root, delta, at_line=1 + 17 * len(outcomes))
        versions = tuple(registry.versions("tone"))
        alias = registry.resolve("tone@prod").version
        outcomes.append((os.WIFSIGNALED(status), versions, alias))
        assert [registry.resolve(entry.ref).version for entry in registry.list()] == list(versions)
        for litter in registry.root.rglob(".tmp-*"):
            os.utime(litter, (0, 0))
        assert registry.publish(delta, "tone", aliases=["prod"]).version == versions[-1] + 1
        assert registry.resolve("tone@prod").version == versions[-1] + 1
        assert not list(registry.root.rglob(".tmp-*"))
    assert len(outcomes) > 60
    killed = {outcome[1:] for outcome in outcomes[:-1]}
    assert killed == {((1,), 1), ((1, 2), 1), ((1, 2), 2)}
    assert outcomes[-1] == (False, (1, 2), 2)


def test_reader_never_sees_half_an_alias_or_version(registry: Registry, delta: Path) -> None:
    registry.publish(delta, "tone", aliases=["prod"])
    pid = os.fork()
    if pid == 0:
        for _ in range(30):
            registry.publish(delta, "tone", aliases=["prod"])
        os._exit(0)
    seen = []
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        seen.append(registry.resolve("tone@prod").version)
    assert seen == sorted(seen) and len(set(seen)) > 1


def test_version_record_holds_no_more_than_it_says(registry: Registry, delta: Path) -> None:
    entry = registry.publish(delta, "tone")
    record = json.loads((entry.path / "ftray_version.json").read_text())
    assert set(record) == {"name", "version", "published_at", "manifest", "size_bytes"}
    assert entry.size_bytes == sum(
        path.stat().st_size for path in entry.path.iterdir() if "version" not in path.name
    )
    assert entry.published_at.endswith("+00:00")


def publish_some(registry: Registry, delta: Path, count: int) -> None:
    for _ in range(count):
        registry.publish(delta, "tone")


def test_rollback_is_exact(registry: Registry, delta: Path) -> None:
    publish_some(registry, delta, 4)
    for version in (2, 4, 4, 3):
        registry.promote(f"tone@{version}")
    registry.promote("tone@1", "canary")
    assert [registry.rollback("tone").version for _ in range(2)] == [4, 2], "a promotion repeated is none"
    assert registry.aliases("tone") == {"prod": 2, "canary": 1}
    with pytest.raises(RegistryError, match="tone@prod: has pointed at version 2 only"):
        registry.rollback("tone")
    registry.promote("tone@canary", "prod")
    assert registry.rollback("tone").version == 2
    with pytest.raises(RegistryError, match="tone@cannary: does not exist"):
        registry.rollback("tone", "cannary")
    assert [done.change for done in registry.history("tone")][:3] == [
        "promote prod 2",
        "promote prod 4",
        "promote prod 3",
    ]


def test_a_damaged_version_is_not_promoted(registry: Registry, delta: Path) -> None:
    publish_some(registry, delta, 2)
    registry.promote("tone@1")
    (registry.resolve("tone@2").path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(RegistryError, match="tone@2 is damaged"):
        registry.promote("tone@2")
    assert registry.aliases("tone") == {"prod": 1}


def test_stamps_change_with_what_references_mean(registry: Registry, delta: Path) -> None:
    assert registry.stamps(["tone"]) == {"tone": (0, 0)}
    seen = []
    for change in (
        lambda: registry.publish(delta, "tone"),
        lambda: registry.publish(delta, "tone", aliases=["prod"]),
        lambda: registry.promote("tone@1"),
        lambda: registry.rollback("tone"),
    ):
        change()
        seen.append(registry.stamps(["tone"])["tone"])
    assert seen == [(1, 0), (2, 1), (2, 2), (2, 3)]
    registry.promote("tone@2")
    registry.publish(delta, "other")
    assert registry.stamps(["tone"])["tone"] == seen[-1], "nothing moved"


def test_reads_during_promotions_and_rollbacks_are_never_mixed(registry: Registry, tmp_path: Path) -> None:
    deltas = [weights_delta(tmp_path / f"delta-{seed}", seed=seed) for seed in (1, 2)]
    known = {entry.version: entry.digest for entry in [registry.publish(delta, "tone") for delta in deltas]}
    registry.promote("tone@1")
    pid = os.fork()
    if pid == 0:
        for _ in range(60):
            registry.promote("tone@2")
            registry.rollback("tone")
        os._exit(0)
    seen = set()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        entry = registry.resolve("tone@prod")
        assert entry.digest == known[entry.version]
        seen.add(entry.version)
    assert seen == {1, 2} and registry.aliases("tone") == {"prod": 1}
