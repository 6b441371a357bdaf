"""Searches that are asked to end, or whose members cannot go on together: nobody is lost by it."""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.errors import RunStopped, TrainError, TuneError
from ftray.core.spec import parse, spec
from ftray.train.population import Population
from ftray.tune.halt import Halt
from ftray.tune.journal import read
from ftray.tune.local import open_search, run_local
from ftray.tune.ray_trials import SegmentSearcher
from ftray.tune.segment import Outcome
from ftray.tune.stall import StallWatch
from tests.recipes import MakeRecipe


@spec
class Interrupting:
    """A constant schedule; if the file `trigger` is there, what it says happens at `step`, once."""

    trigger: str
    step: int

    def scale(self, step: int, progress: float) -> float:
        """1."""
        del progress
        trigger = Path(self.trigger)
        if step == self.step and trigger.exists():
            asked = trigger.read_text()
            trigger.unlink()
            if asked == "stop":
                for folder in trigger.parent.glob("stopped/segments/*-s001-*"):
                    (folder / "stop").touch()
            else:
                os.kill(os.getpid(), signal.Signals[asked])
        return 1.0


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    schedule = {"type": f"{__name__}:Interrupting", "trigger": str(tmp_path / "trigger"), "step": 3}
    return make_recipe(train__global_batch_size=2, data__max_length=64, lr_scheduler=schedule)


def search(folder: Path, name: str, **changes: Any) -> TuneConfig:
    settings = {
        "name": name,
        "output_dir": str(folder),
        "recipe": "recipe.yaml",
        "space": {"optim.learning_rate": {"loguniform": [1e-3, 1e-1]}},
        "num_members": 2,
        "num_segments": 2,
        "segment_steps": 3,
    }
    return parse(TuneConfig, settings | changes)


@pytest.mark.parametrize(
    ("executor", "asked"),
    [
        ("trials", "SIGTERM"),
        ("population", "SIGTERM"),
        pytest.param("trials", "stop", marks=pytest.mark.slow),
        pytest.param("population", "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_who_is_asked_to_end_goes_on_later_to_the_same_winner(
    recipe: Recipe, tmp_path: Path, executor: str, asked: str
) -> None:
    undisturbed = run_local(search(tmp_path, "undisturbed", executor=executor), recipe)
    (tmp_path / "trigger").write_text(asked)
    config = search(tmp_path, "stopped", executor=executor)
    with pytest.raises(RunStopped, match="`--resume` goes on") as caught:
        run_local(config, recipe)
    assert caught.value.signum == (None if asked == "stop" else signal.Signals[asked])
    journal = tmp_path / "stopped" / "journal.jsonl"
    before = read(journal)
    assert [record["kind"] for record in before].count("commit") >= 2, "the first generation is through"
    resumed = run_local(config, recipe)
    records = read(journal)
    assert records[: len(before)] == before and "fail" not in [record["kind"] for record in records]
    assert (resumed.member, resumed.score, resumed.config, resumed.lineage) == (
        undisturbed.member,
        undisturbed.score,
        undisturbed.config,
        undisturbed.lineage,
    )


def test_what_ends_all_members_of_a_population_is_no_failure_of_theirs(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory; the same search then goes on with fewer rows in a pass."""
    trained = Population.train

    def too_many_rows(self: Population, parts: Any, *, rows_per_pass: int | None = None) -> Any:
        if rows_per_pass is None:
            raise TrainError("out of memory")
        return trained(self, parts, rows_per_pass=rows_per_pass)

    monkeypatch.setattr(Population, "train", too_many_rows)
    with pytest.raises(TuneError, match=r"out of memory; .*with --resume goes on"):
        run_local(search(tmp_path, "stopped", executor="population"), recipe)
    executor = {"type": "population", "rows_per_pass": 2}
    result = run_local(search(tmp_path, "stopped", executor=executor), recipe)
    kinds = [record["kind"] for record in read(result.journal)]
    assert "fail" not in kinds and kinds.count("commit") == 4 and result.num_drivers == 2


def test_what_ended_all_members_by_chance_is_tried_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as a member is; then it ends the search and nobody is out of it."""
    undisturbed = run_local(search(tmp_path, "undisturbed", executor="population"), recipe)
    trained, failures = Population.train, ["once"]

    def fail(self: Population, parts: Any, *, rows_per_pass: int | None = None) -> Any:
        if failures and parts[0].start_from is not None:
            failures.pop()
            raise ConnectionError("lost")
        return trained(self, parts, rows_per_pass=rows_per_pass)

    monkeypatch.setattr(Population, "train", fail)
    result = run_local(search(tmp_path, "again", executor="population"), recipe)
    assert (result.score, result.lineage) == (undisturbed.score, undisturbed.lineage)
    assert not failures and result.num_drivers == 1
    failures += ["once", "twice"]
    with pytest.raises(TuneError, match="lost; once it is mended"):
        run_local(search(tmp_path, "ended", executor="population"), recipe)
    records = read(tmp_path / "ended" / "journal.jsonl")
    assert [record["final"] for record in records if record["kind"] == "fail"] == [False, False]


def test_a_signal_lets_all_segments_save_before_the_search_ends(recipe: Recipe, tmp_path: Path) -> None:
    engine, job = open_search(search(tmp_path, "asked"), recipe)
    searcher = SegmentSearcher(engine, job, StallWatch(tmp_path / "segments", None))
    now = [0.0]
    searcher.halt = Halt(job, lambda: now[0])
    names = [searcher.suggest(trial)["segments"][0]["name"] for trial in ("a", "b")]
    for name in names:
        job.path(name).mkdir(parents=True)
    with searcher.halt.heard():
        searcher.end_stall()
        os.kill(os.getpid(), signal.SIGTERM)
        searcher.end_stall()
        assert all((job.path(name) / "stop").is_file() for name in names)
        stopped = asdict(Outcome(error="run: stopped (stop)", fatal=True, stopped=True))
        searcher.on_trial_complete("a", {"outcomes": json.dumps([stopped])})
        assert searcher.suggest("c") is None, "nothing is begun, and the other segment still saves"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        now[0] = 30.0
        with pytest.raises(RunStopped, match=r"stopped \(SIGTERM\); `--resume` goes on") as caught:
            searcher.end_stall()
    engine.close()
    assert caught.value.signum == signal.SIGTERM
    assert "fail" not in [record["kind"] for record in engine.journal.records]


def test_a_process_that_died_with_several_members_is_started_again_and_then_the_search_ends(
    recipe: Recipe, tmp_path: Path
) -> None:
    for executor, failed, ends in (("population", [False, False], True), ("trials", [False, True], False)):
        engine, job = open_search(search(tmp_path, executor, executor=executor), recipe)
        searcher = SegmentSearcher(engine, job, StallWatch(tmp_path / "segments", None))
        first = searcher.suggest("trial")["segments"]
        searcher.on_trial_complete("trial", error=True)
        again = searcher.suggest("again")["segments"]
        assert [segment["attempt"] for segment in again] == [1] * len(first)
        assert [segment["name"] for segment in again] == [segment["name"] for segment in first]
        searcher.on_trial_complete("again", error=True)
        fails = [record["final"] for record in engine.journal.records if record["kind"] == "fail"]
        engine.close()
        assert fails == failed
        assert (searcher.error is not None) == ends
        if ends:
            with pytest.raises(TuneError, match=r"process of 2 members died; .*--resume"):
                searcher.suggest("next")
