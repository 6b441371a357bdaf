"""Searches over real Ray Tune with a toy to train: what happened must be what the journal says."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from ray import tune
from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftray.config.load import load
from ftray.config.tune import TuneConfig
from ftray.core.errors import TuneError
from ftray.testing.toy_train import RECIPE
from ftray.tune.journal import read
from ftray.tune.population import replay
from ftray.tune.ray_trials import run

pytestmark = pytest.mark.ray

SEARCH = {
    "name": "search",
    "space": {"optim.learning_rate": {"loguniform": [1e-3, 0.3]}, "adapt.r": {"choice": [2, 4, 8]}},
    # The toy's scores differ by orders of magnitude, so none of them counts as exploded.
    "policy": {"type": "pbt", "explosion_factor": None},
    "num_members": 4,
    "num_segments": 3,
    "segment_steps": 4,
    "train_fn": "ftray.testing.toy_train:train",
}


def write_search(folder: Path, toy: dict | None = None, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "toy.json").write_text(json.dumps(toy or {}))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": {"train": str(folder / "toy.json")}}))
    file = folder / "tune.yaml"
    where = {"recipe": str(recipe), "output_dir": str(folder / "runs")}
    file.write_text(yaml.safe_dump({**SEARCH, **where, **changes}))
    return file


def search(folder: Path, toy: dict | None = None, *, resume: bool = False, callbacks=(), **changes):
    config = load(TuneConfig, write_search(folder, toy, **changes))
    return run(config, resume=resume, callbacks=callbacks)


class Told(tune.Callback):
    """A user's own: what it is told of each segment."""

    def __init__(self):
        self.results = []

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.results.append(result)


def outcome(result) -> tuple:
    return result.member, result.score, result.config, result.lineage, result.checkpoint.parts[-3:]


def work(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "toy.log").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    TOLD.results.clear()
    return search(folder, callbacks=[TOLD, JsonLoggerCallback(), TBXLoggerCallback()]), folder


TOLD = Told()


def test_callbacks_and_loggers_of_ray_tune_are_told_of_every_segment(undisturbed):
    result = undisturbed[0]
    commits = [record for record in read(result.journal) if record["kind"] == "commit"]
    told = {(r["member"], r["segment"]): r for r in TOLD.results}
    assert len(told) == len(TOLD.results) == len(commits) == 12
    for record in commits:
        seen = told[record["member"], record["segment"]]
        assert seen["score"] == seen["eval_loss"] == record["score"]
        assert seen["hyperparameters"] == record["config"] and seen["steps"] == 4 * (record["segment"] + 1)
        [home] = (result.folder / "tune" / "driver-1").glob(f"{record['checkpoint']}-*")
        assert json.loads((home / "result.json").read_text())["score"] == record["score"]
        events = EventAccumulator(str(home))
        events.Reload()
        assert events.Scalars("ray/tune/score")[0].value == pytest.approx(record["score"])
    found = tune.ExperimentAnalysis(str(home.parent), default_metric="score", default_mode="min")
    assert found.best_result["score"] == min(record["score"] for record in commits)
    assert set(found.dataframe()["hyperparameters/adapt.r"]) == {r["config"]["adapt.r"] for r in commits}


def test_every_segment_is_trained_once_and_members_are_perturbed(undisturbed):
    result, folder = undisturbed
    steps = Counter((line["run"], line["step"]) for line in work(folder))
    assert len(steps) == 4 * 3 * 4 and set(steps.values()) == {1}
    assert result.num_segments == 12 and result.num_drivers == 1
    assert result.num_perturbations == result.num_exploits == 2
    # Two slots, used again: a process for each segment would be twelve.
    assert len({line["pid"] for line in work(folder)}) <= 3


def test_the_lineage_is_that_of_the_journal_and_of_the_work_done(undisturbed):
    result = undisturbed[0]
    records = read(result.journal)
    members = replay(records).members
    assert members[result.member].lineage == result.lineage
    assert result.score == min(member.score for member in members)
    for record in (r for r in records if r["kind"] == "commit"):
        segment = json.loads((result.folder / "segments" / record["checkpoint"] / "segment.json").read_text())
        assert segment["segment"]["config"] == record["config"]
        assert segment["metrics"]["eval_loss"] == record["score"]
    assert [step["segment"] for step in result.schedule] == [0, 1, 2]
    # The winner's weights follow from its schedule alone.
    weight = 4.0
    for step in range(12):
        rate = result.schedule[step // 4]["config"]["optim.learning_rate"]
        weight -= rate * random.Random(step).uniform(0.5, 1.5) * weight
    assert weight**2 == result.score


def test_what_the_report_names_is_there_and_what_nobody_needs_is_not(undisturbed):
    result = undisturbed[0]
    written = json.loads((result.folder / "tune_result.json").read_text())
    assert written["score"] == result.score and Path(written["delta"]).is_dir()
    assert json.loads((result.checkpoint / "state.json").read_text())["step"] == 12
    assert (result.folder / "tune.png").read_bytes().startswith(b"\x89PNG")
    kept = {path.parent.name for path in (result.folder / "segments").glob("*/checkpoints")}
    assert kept == {member.checkpoint for member in replay(read(result.journal)).members}


def test_the_number_of_slots_changes_nothing(undisturbed, tmp_path):
    # Of what a trial claims here there is one, so that one trains at a time.
    claims = {"node:__internal_head__": 1.0}
    assert outcome(search(tmp_path, resources_per_trial=claims)) == outcome(undisturbed[0])
    runs = [line["run"] for line in work(tmp_path)]
    assert [run for run, _ in itertools.groupby(runs)] == list(dict.fromkeys(runs))


def test_an_existing_search_is_refused_and_a_finished_one_reported(undisturbed):
    result, folder = undisturbed
    with pytest.raises(TuneError, match="--resume"):
        search(folder)
    again = search(folder, resume=True)
    assert outcome(again) == outcome(result)
    assert len(work(folder)) == 48


def test_crashing_raising_and_diverging_members_are_replaced(ray_cluster, tmp_path):
    toy = {"crash": ["m000-s000"], "raise": ["m001-s000"], "diverge": ["m002-s001"]}
    result = search(tmp_path, toy)
    fails = [record for record in read(result.journal) if record["kind"] == "fail"]
    # A crash and an exception are tried again once, a divergence is not.
    assert Counter(record["member"] for record in fails) == {0: 2, 1: 2, 2: 1}
    reasons = {record["member"]: record["reason"] for record in fails}
    assert "process died" in reasons[0] and "told to fail" in reasons[1] and "nan" in reasons[2]
    assert result.num_replaced == 3
    members = replay(read(result.journal)).members
    assert all(member.alive and member.segment == 3 for member in members)
    assert result.num_segments == 12 - 3


def test_when_all_fail_or_the_metric_is_never_reported_the_search_says_so(ray_cluster, tmp_path):
    with pytest.raises(TuneError, match=r"every member has failed.*told to fail"):
        search(tmp_path / "raise", {"raise": ["m"]})
    with pytest.raises(TuneError, match=r"metric: no segment reports 'accuracy'; known: eval_loss"):
        search(tmp_path / "metric", metric="accuracy", mode="max")
    assert read(tmp_path / "metric" / "runs" / "search" / "journal.jsonl")[0]["kind"] == "open"


@pytest.mark.slow
def test_a_search_that_stands_still_is_ended_and_can_go_on(ray_cluster, tmp_path):
    started = time.monotonic()
    with pytest.raises(TuneError, match=r"no progress for 20 s, m001-s001-\w+ without a sign of life"):
        search(tmp_path, {"hang": ["m001-s001"]}, stall_s=20.0)
    assert time.monotonic() - started < 90
    before = read(tmp_path / "runs" / "search" / "journal.jsonl")
    result = search(tmp_path, resume=True)
    assert result.num_drivers == 2 and read(result.journal)[: len(before)] == before


@pytest.mark.parametrize(
    ("changes", "num_segments"),
    [
        pytest.param({"policy": {"type": "asha", "reduction_factor": 2}}, 4 + 2 + 1, marks=pytest.mark.slow),
        pytest.param(
            {"policy": {"type": "tpe", "num_startup": 2}, "num_segments": 1}, 4, marks=pytest.mark.slow
        ),
        ({"policy": {"type": "pbt", "selection": "tournament"}, "asynchronous": True}, 12),
    ],
)
def test_other_policies_run_through_the_same_engine(ray_cluster, tmp_path, changes, num_segments):
    result = search(tmp_path, **changes)
    assert result.num_segments == num_segments and result.cost.tokens == num_segments * 4 * 10
    members = replay(read(result.journal)).members
    assert result.score == min(member.score for member in members)


@pytest.mark.parametrize(
    ("num_records", "signum"),
    [
        (11, signal.SIGKILL),
        pytest.param(4, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(20, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(11, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(11, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_driver_that_is_ended_goes_on_to_the_same_winner(undisturbed, tmp_path, num_records, signum):
    file = write_search(tmp_path, {"sleep_s": 0.1})
    script = "import sys; from ftray.cli.main import main; main(['tune', sys.argv[1]])"
    with (tmp_path / "told").open("wb") as told:
        driver = subprocess.Popen(
            [sys.executable, "-c", script, file], stdout=subprocess.DEVNULL, stderr=told
        )
    journal = tmp_path / "runs" / "search" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() or len(read(journal)) < num_records:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signum)
    driver.wait()
    before = read(journal)
    assert not [record for record in before if record["kind"] == "fail"]
    if signum != signal.SIGKILL:
        assert driver.returncode == 128 + signum
        assert (tmp_path / "told").read_text().splitlines()[-1].startswith("stopped: ")
    result = search(tmp_path, resume=True)
    assert outcome(result) == outcome(undisturbed[0])
    assert read(journal)[: len(before)] == before
    assert result.num_drivers == 2 and result.num_segments == 12
    # At most what was running is done again: two segments of four steps.
    assert len(work(tmp_path)) <= 48 + 2 * 4
