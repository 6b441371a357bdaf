"""Searches whose members share one base in memory: the same decisions as in trials of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftray.config.load import write_resolved
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import parse
from ftray.tune.executor import Populations
from ftray.tune.journal import Record, read
from ftray.tune.local import open_search, run_local
from ftray.tune.replay import replay_schedule
from ftray.tune.report import report
from ftray.tune.result import TuneResult
from tests.recipes import MakeRecipe


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(train__global_batch_size=2, data__max_length=64)


def search(folder: Path, recipe: Recipe, name: str, **changes: Any) -> TuneConfig:
    write_resolved(recipe, folder / "recipe.yaml")
    settings = {
        "name": name,
        "output_dir": str(folder),
        "recipe": str(folder / "recipe.yaml"),
        "space": {
            "optim.learning_rate": {"loguniform": [1e-3, 1e-1]},
            "adapt.r": {"choice": [2, 4]},
            "adapt.lora_dropout": {"choice": [0.0, 0.1]},
        },
        "executor": "population",
        "num_members": 4,
        "num_segments": 3,
        "segment_steps": 2,
    }
    return parse(TuneConfig, settings | changes)


def decisions(records: list[Record]) -> list[tuple[int, int, dict[str, Any]]]:
    return [(d["member"], d["donor"], d["config"]) for record in records for d in record.get("decisions", [])]


def scores(records: list[Record]) -> dict[tuple[int, int], float]:
    return {(r["member"], r["segment"]): r["score"] for r in records if r["kind"] == "commit"}


def same(one: TuneResult, other: TuneResult) -> None:
    ours, theirs = read(one.journal), read(other.journal)
    assert decisions(ours) == decisions(theirs) and decisions(ours)
    assert scores(ours) == pytest.approx(scores(theirs), rel=1e-5)
    assert (one.member, one.lineage, one.config) == (other.member, other.lineage, other.config)


@pytest.mark.slow
def test_decides_as_trials_do_in_one_population_or_two(recipe: Recipe, tmp_path: Path) -> None:
    """Also across populations, by each other's checkpoints; the winner is reported, and trained again alone."""
    trials = run_local(search(tmp_path, recipe, "trials", executor="trials"), recipe)
    one = run_local(search(tmp_path, recipe, "one"), recipe)
    two = run_local(
        search(tmp_path, recipe, "two", executor={"type": "population", "num_populations": 2}), recipe
    )
    same(one, trials)
    same(two, trials)
    starts = [r for r in read(two.journal) if r["kind"] == "start"]
    across = [r for r in starts if r["checkpoint"] and int(r["checkpoint"][1:4]) // 2 != r["member"] // 2]
    assert across, "no member has gone on from one of the other population"
    assert one.cost.tokens == trials.cost.tokens and one.cost.cpu_s > 0
    written = report(one.folder)
    assert {path.name for path in written.files} >= {"lineage.png", "best.yaml"}
    again = replay_schedule(one.journal)
    assert again.score == pytest.approx(one.score, rel=1e-5)
    assert again.rounded and again.equal is False


def test_halving_leaves_room_in_the_passes(recipe: Recipe, tmp_path: Path) -> None:
    policy = {"type": "asha", "reduction_factor": 2}
    config = search(
        tmp_path, recipe, "asha", policy=policy, executor={"type": "population", "rows_per_pass": 4}
    )
    result = run_local(config, recipe)
    assert [len(g) for g in groups(read(result.journal))] == [4, 2, 1]


def groups(records: list[Record]) -> list[list[Record]]:
    """Starts that follow each other."""
    found: list[list[Record]] = [[]]
    for record in records:
        if record["kind"] == "start":
            found[-1].append(record)
        elif found[-1]:
            found.append([])
    return [group for group in found if group]


DRIVER = """
import sys
from ftray.config.load import load
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.tune.local import run_local
config = load(TuneConfig, sys.argv[1], [])
run_local(config, load(Recipe, config.recipe, []))
"""


@pytest.mark.slow
def test_a_killed_driver_changes_nothing_but_time(recipe: Recipe, tmp_path: Path) -> None:
    """SIGKILL while the second generation trains, then again in the midst of its commits."""
    undisturbed = run_local(search(tmp_path, recipe, "undisturbed"), recipe)
    config = search(tmp_path, recipe, "killed")
    write_resolved(config, tmp_path / "search.yaml")
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "search.yaml")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("segments/*-s001-*/metrics.jsonl"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline, "the second generation has not begun"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    engine, job = open_search(config, recipe)
    group = engine.next_group()
    outcomes = engine.config.executor.run(job, group)
    outcome = outcomes[0]
    assert outcome.score is not None
    engine.finished(group[0], outcome.score, outcome.metrics or {}, outcome.seconds)
    engine.close()  # three results lie there, and no record says so
    resumed = run_local(config, recipe)
    assert resumed.num_drivers == 3 and resumed.num_segments == undisturbed.num_segments
    same(resumed, undisturbed)
    results = [json.loads(path.read_text()) for path in folder.glob("segments/*/segment.json")]
    assert len(results) == 12


def test_what_a_population_cannot_do_is_told_before_it_begins(
    recipe: Recipe, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    full = make_recipe(adapt="full", train__global_batch_size=2)
    sharded = make_recipe(strategy="deepspeed", train__global_batch_size=2)
    rate = {"optim.learning_rate": {"uniform": [0.1, 0.2]}}
    cases: list[tuple[str, Recipe, dict[str, Any]]] = [
        ("adapt: `full` trains the base", full, {"space": rate}),
        (
            "space.model.dtype: members",
            recipe,
            {"space": {"model.dtype": {"choice": ["float32", "bfloat16"]}}},
        ),
        ("space.adapt.target_modules", recipe, {"space": {"adapt.target_modules": {"choice": [["q_proj"]]}}}),
        ("executor: `Population` steps each member by", sharded, {"spread": True}),
        ("asynchronous: members", recipe, {"asynchronous": True}),
        ("train_fn: ftray.testing", recipe, {"train_fn": "ftray.testing.toy_train:train"}),
    ]
    for words, given, changes in cases:
        with pytest.raises(ConfigError) as caught:
            run_local(search(tmp_path, given, "refused", **changes), given)
        assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_members_are_divided_evenly() -> None:
    three = Populations(num_populations=3)
    assert [three.group_size(living) for living in (9, 8, 3, 1)] == [3, 3, 1, 1]
