"""What a search leaves on the disk: what its members refer to, and reports."""

import json
import shutil
from pathlib import Path

import pytest

from ftray.config.load import load
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.spec import parse
from ftray.testing.toy_train import RECIPE
from ftray.tune.collect import Collector
from ftray.tune.journal import read
from ftray.tune.local import open_search, run_local, take
from ftray.tune.population import replay
from ftray.tune.segment import Outcome


def search(folder: Path, toy: dict) -> tuple[TuneConfig, Recipe]:
    (folder / "toy.json").write_text(json.dumps(toy))
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({**RECIPE, "data": {"train": str(folder / "toy.json")}}))
    settings = {
        "name": "search",
        "output_dir": str(folder),
        "recipe": str(file),
        "space": {"optim.learning_rate": {"loguniform": [1e-3, 0.3]}},
        "policy": {"type": "pbt", "explosion_factor": None},
        "segment_steps": 2,
        "train_fn": "ftray.testing.toy_train:train",
    }
    return parse(TuneConfig, settings), load(Recipe, file)


def kept(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "search" / "segments").glob("*/checkpoints")}


def test_only_what_a_member_refers_to_stays_whoever_failed_or_was_killed(tmp_path: Path) -> None:
    config, recipe = search(tmp_path, {"raise": ["m001-s001"], "diverge": ["m002-s001"]})
    result = run_local(config, recipe)
    needed = {member.checkpoint for member in replay(read(result.journal)).members}
    assert kept(tmp_path) == needed and len(needed) > 1
    # A driver that was killed before it could delete: the next one does, also where nothing is left to train.
    segments = result.folder / "segments"
    [failed] = segments.glob("m001-s001-*")
    for old in (failed, next(segments.glob("m000-s000-*"))):
        shutil.copytree(result.checkpoint.parent, old / "checkpoints")
    run_local(config, recipe)
    assert kept(tmp_path) == needed


def test_a_failure_is_told_with_the_step_it_had_got_to(tmp_path: Path) -> None:
    config, recipe = search(tmp_path, {})
    engine, job = open_search(config, recipe)
    segment = engine.next_segment()
    assert segment is not None
    for step in (2, 10):
        (job.path(segment.name) / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    take(engine, segment, Outcome(error="node lost", retry=True), 0.0)
    engine.close()
    assert engine.journal.records[-1]["step"] == 10 and not engine.journal.records[-1]["final"]


def test_nothing_is_deleted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, recipe = search(tmp_path, {})
    run_local(config, recipe)
    engine, job = open_search(config, recipe)
    deleted: list[Path] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **settings: deleted.append(path))
    collector = Collector(engine, job)
    collector.collect()
    collector.collect()
    engine.close()
    assert len(deleted) == len(set(deleted)) == 2 * (4 * 3 - 4)
