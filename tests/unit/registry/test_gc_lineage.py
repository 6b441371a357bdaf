"""What is collected and what never is; where deltas come from and what came of them."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ftray.cli.main import main
from ftray.core.errors import RegistryError
from ftray.registry.gc import collect
from ftray.registry.lineage import lineage, saw
from ftray.registry.registry import Registry
from ftray.registry.state import MAX_BACK
from ftray.testing.deltas import weights_delta

Publish = Callable[..., str]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def publish(registry: Registry, tmp_path: Path) -> Publish:
    """Publish a delta of its own content under a name; returns its digest."""
    count = 0

    def publish_one(name: str, *, parents: list[str] | None = None, **sources: str) -> str:
        nonlocal count
        count += 1
        folder = weights_delta(tmp_path / f"delta-{count}", seed=count)
        fields = {"parents": parents or [], "sources": {f"/data/{k}.jsonl": v for k, v in sources.items()}}
        return registry.publish(folder, name, lineage=fields).digest

    return publish_one


def test_nothing_referenced_is_collected(registry: Registry, publish: Publish) -> None:
    digests = [publish("tone") for _ in range(9)]
    registry.promote("tone@2")
    registry.promote("tone@3")
    registry.pin("tone@5", "figure 2")
    publish("mix", parents=["tone@6", digests[6]])
    dry = collect(registry, keep=1, min_age_s=0)
    assert dry.removed == ["tone@1", "tone@4", "tone@8"] and dry.freed_bytes > 0
    assert dry.kept["tone@5"] == "pinned: figure 2" and dry.kept["tone@6"] == "parent of mix@1"
    assert dry.kept["tone@7"] == "parent of mix@1" and "rolled back" in dry.kept["tone@2"]
    assert registry.versions("tone") == list(range(1, 10)), "a dry run removes nothing"
    assert collect(registry, delete=True, keep=1, min_age_s=0) == dry
    assert registry.versions("tone") == [2, 3, 5, 6, 7, 9]
    assert registry.rollback("tone").version == 2
    registry.unpin("tone@5")
    assert collect(registry, delete=True, keep=1, min_age_s=0).removed == ["tone@3", "tone@5"]
    assert not list(registry.root.rglob(".gone-*"))


def test_parents_of_parents_stay_and_those_of_what_goes_do_not(registry: Registry, publish: Publish) -> None:
    publish("seed")
    publish("seed")
    publish("warm", parents=["seed@1"])
    publish("warm", parents=["seed@2"])
    publish("warm", parents=[])
    publish("last", parents=["warm@1"])
    assert collect(registry, delete=True, keep=1, min_age_s=0).removed == ["warm@2"]
    assert lineage(registry, "last").ancestors[-1].ref == "seed@1"


def test_young_and_newest_versions_stay(registry: Registry, publish: Publish) -> None:
    for _ in range(4):
        publish("tone")
    assert collect(registry).removed == []
    assert collect(registry, min_age_s=0, keep=2).removed == ["tone@1", "tone@2"]
    with pytest.raises(RegistryError, match="keep: 0"):
        collect(registry, keep=0)


def test_a_promotion_during_a_collection_is_not_lost(registry: Registry, publish: Publish) -> None:
    """Both orders of `hide` and `promote`: the version stays, or the promotion is refused and undone."""
    for _ in range(3):
        publish("tone")
    registry.promote("tone@3")
    shelf, hide, promoted = registry.shelf, registry.shelf.hide, []

    def hide_after_a_promotion(name: str, version: int) -> None:
        if version == 1:
            promoted.append(registry.promote("tone@1").ref)
        hide(name, version)
        if version == 2:
            with pytest.raises(RegistryError, match="tone@2: no such version"):
                registry.alias("tone", "prod", 2)

    shelf.hide = hide_after_a_promotion  # type: ignore[method-assign]
    assert collect(registry, delete=True, keep=1, min_age_s=0).removed == ["tone@2"]
    assert promoted == ["tone@1"] and registry.resolve("tone@prod").version == 1


def test_a_promotion_that_looked_too_early_is_undone(registry: Registry, publish: Publish) -> None:
    for _ in range(3):
        publish("tone")
    registry.promote("tone@3")
    add, shelf = registry.shelf.add_state, registry.shelf

    def add_after_hiding(name: str, number: int, value: object) -> None:
        shelf.add_state = add  # type: ignore[method-assign]
        shelf.hide("tone", 1)
        add(name, number, value)

    shelf.add_state = add_after_hiding  # type: ignore[method-assign]
    with pytest.raises(RegistryError, match="tone@1: no such version any more"):
        registry.alias("tone", "prod", 1)
    assert registry.aliases("tone") == {"prod": 3}


def test_what_a_killed_collection_hid_comes_back_if_it_is_needed(
    registry: Registry, publish: Publish
) -> None:
    for _ in range(3):
        publish("tone")
    registry.promote("tone@1")
    for version in (1, 2):
        registry.shelf.hide("tone", version)
    assert collect(registry, delete=True, keep=1, min_age_s=0).removed == ["tone@2"]
    assert registry.resolve("tone@prod").version == 1


def test_a_damaged_version_stops_a_collection(registry: Registry, publish: Publish) -> None:
    for _ in range(3):
        publish("tone")
    (registry.show("tone@2").path / "ftray_delta.json").write_text("{")
    with pytest.raises(RegistryError, match="tone@2 is damaged"):
        collect(registry, delete=True, keep=1, min_age_s=0)
    assert registry.versions("tone") == [1, 2, 3]


def test_two_collections_at_once_are_refused(registry: Registry, publish: Publish) -> None:
    publish("tone")
    with registry.shelf.collecting(), pytest.raises(RegistryError, match="another collection"):
        collect(registry, delete=True)
    collect(registry, delete=True)


def test_history_is_bounded_and_forgotten_versions_can_go(registry: Registry, publish: Publish) -> None:
    for _ in range(MAX_BACK + 3):
        publish("tone")
    for version in registry.versions("tone"):
        registry.promote(f"tone@{version}")
    assert collect(registry, min_age_s=0, keep=1).removed == ["tone@1", "tone@2"]


def test_lineage_both_ways(registry: Registry, publish: Publish) -> None:
    seed = publish("seed")
    publish("warm", parents=[seed, "xxh3:elsewhere"])
    publish("left", parents=["warm@1"])
    publish("right", parents=["warm@1", "seed@1"])
    found = lineage(registry, "warm")
    assert [(one.ref, one.entry is not None, one.steps) for one in found.ancestors] == [
        ("seed@1", True, 1),
        ("xxh3:elsewhere", False, 1),
    ]
    assert [(one.ref, one.steps) for one in found.descendants] == [("left@1", 1), ("right@1", 1)]
    assert [(one.ref, one.steps) for one in lineage(registry, "seed").descendants] == [
        ("right@1", 1),
        ("warm@1", 1),
        ("left@1", 2),
    ]


def test_which_deltas_saw_a_file(registry: Registry, publish: Publish, tmp_path: Path) -> None:
    publish("a", chat="xxh3:aa", code="xxh3:bb")
    publish("b", code="xxh3:cc")
    publish("mix", parents=["a@1", "b@1"])
    publish("other")
    for source in ("/data/chat.jsonl", "chat.jsonl", "xxh3:aa"):
        assert [(one.entry.ref, one.through) for one in saw(registry, source)] == [
            ("a@1", ""),
            ("mix@1", "a@1"),
        ]
    assert [one.entry.ref for one in saw(registry, "code.jsonl")] == ["a@1", "b@1", "mix@1"]
    assert [one.entry.ref for one in saw(registry, "xxh3:cc")] == ["b@1", "mix@1"]
    assert saw(registry, "hat.jsonl") == saw(registry, "") == []


def test_verbs(registry: Registry, publish: Publish, capsys: pytest.CaptureFixture[str]) -> None:
    def ftray(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--registry", str(registry.root)])
        assert ended.value.code == 0
        return capsys.readouterr().out

    for _ in range(2):
        publish("tone", chat="xxh3:aa")
    publish("mix", parents=["tone@1"])
    assert "child    mix@1" in (out := ftray("lineage", "tone@1")) and "source   /data/chat.jsonl" in out
    assert json.loads(ftray("lineage", "mix", "--json"))["ancestors"] == [
        {"ref": "tone@1", "here": True, "steps": 1}
    ]
    assert (
        ftray("lineage", "--source", "chat.jsonl").splitlines()[0]
        == "mix@1  /data/chat.jsonl  through tone@1"
    )
    ftray("registry", "pin", "tone@1", "--reason", "paper")
    assert "pin 1" in ftray("registry", "history", "tone")
    assert "0 versions to remove" in ftray("registry", "gc")
    publish("tone")
    gone = json.loads(ftray("registry", "gc", "--min-age-days", "0", "--keep", "1", "--delete", "--json"))
    assert gone["removed"] == ["tone@2"] and gone["deleted"]
    at = datetime.datetime.fromisoformat(registry.history("tone")[0].at)
    assert (datetime.datetime.now(datetime.UTC) - at).total_seconds() < 60
