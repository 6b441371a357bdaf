"""Segments run in this process, without Ray."""

import contextlib
import json
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ftray.config.recipe import Recipe
from ftray.config.tune import TRAIN_FN, TuneConfig
from ftray.core.errors import ClusterError, ConfigError, GroupFailed, TrainError
from ftray.core.spec import parse
from ftray.core.spec import replace as spec_replace
from ftray.testing import toy_train
from ftray.train.track.jsonl import read_records
from ftray.tune.as_searched import in_steps, segment_recipe
from ftray.tune.engine import Segment
from ftray.tune.segment import Job, load_function, read_result, run_segment, run_segments
from ftray.tune.space import Space, apply

SEGMENT = Segment(
    name="m000-s000-abc",
    member=0,
    segment=0,
    epoch=1,
    attempt=0,
    checkpoint=None,
    config={"optim.learning_rate": 0.1},
    stop_at=4,
)


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    (tmp_path / "toy.json").write_text("{}")
    data = {
        "name": "toy",
        "model": {"init": "config", "config": {"model_type": "llama"}},
        "data": {"train": str(tmp_path / "toy.json")},
        "adapt": "lora",
        "objective": "sft",
        "optim": "adamw",
        "lr_scheduler": "cosine",
        "strategy": {"type": "ddp", "num_workers": 2},
        "train": {"num_train_epochs": 3, "save_steps": 5},
        "tracking": ["wandb"],
    }
    return parse(Recipe, data)


@pytest.fixture
def job(tmp_path, recipe) -> Job:
    plain = segment_recipe(search_of(8), recipe)
    return Job(str(tmp_path / "search"), plain, "ftray.testing.toy_train:train", "eval_loss", str(tmp_path))


def search_of(segment_steps: int, **changes) -> TuneConfig:
    """A search of so many steps in all."""
    space = {"optim.learning_rate": {"uniform": [0, 1]}}
    settings = {"num_segments": 1, "segment_steps": segment_steps, **changes}
    return parse(TuneConfig, {"name": "s", "recipe": "r", "space": space, **settings})


def steps_done(tmp_path) -> int:
    log = tmp_path / "toy.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_the_search_says_how_long_and_in_one_worker(recipe):
    plain = parse(Recipe, segment_recipe(search_of(12), recipe))
    assert plain.train.max_steps == 12 and plain.train.num_train_epochs is None
    assert plain.strategy.num_workers == 1 and plain.tracking == [] and plain.train.bf16 is False


def test_a_segment_trains_with_its_configuration_and_leaves_its_result(job, tmp_path):
    outcome = run_segment(job, SEGMENT)
    slower = run_segment(job, replace(SEGMENT, name="other", config={"optim.learning_rate": 0.01}))
    assert outcome.error == "" and outcome.score < slower.score < 16.0
    checkpoint, delta = read_result(job.path(SEGMENT.name))
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 4 and delta.is_dir()


def test_finished_work_is_found_not_done_again(job, tmp_path):
    first = run_segment(job, SEGMENT)
    assert run_segment(job, replace(SEGMENT, epoch=2, attempt=1)) == first
    assert steps_done(tmp_path) == 4


def test_a_segment_goes_on_from_its_donor(job, tmp_path):
    first = run_segment(job, SEGMENT)
    after = replace(SEGMENT, name="m001-s001-def", member=1, segment=1, checkpoint=SEGMENT.name, stop_at=8)
    second = run_segment(job, after)
    assert steps_done(tmp_path) == 8 and second.score < first.score


def test_failures_say_whether_another_attempt_may_help(job, tmp_path):
    wrong = run_segment(job, replace(SEGMENT, config={"optim.learning_rate": -1.0}))
    assert "learning_rate" in wrong.error and "\n" not in wrong.error and not wrong.retry
    (tmp_path / "toy.json").write_text(json.dumps({"raise": ["m000"]}))
    raised = run_segment(job, SEGMENT)
    assert raised.error == "RuntimeError: told to fail" and raised.retry and raised.score is None


def test_a_worker_group_that_dies_is_worth_another_attempt(job):
    """Of one member, and of all together; a mistake that its workers met is not."""

    def found(error: Exception, *, of_all: bool) -> tuple[bool, bool]:
        def train(*_):
            if of_all:
                raise error
            return [error]

        (outcome,) = run_segments(job, [SEGMENT], train)
        assert str(error) in outcome.error
        return outcome.retry, outcome.fatal

    for error in (GroupFailed("the worker group failed"), ClusterError("no room")):
        assert found(error, of_all=False) == (True, False) and found(error, of_all=True) == (True, True)
    mistake = TrainError("not finite")
    assert found(mistake, of_all=False) == (False, False) and found(mistake, of_all=True) == (False, True)


def test_a_metric_that_is_not_reported_ends_the_search(job):
    outcome = run_segment(replace(job, metric="accuracy"), SEGMENT)
    assert outcome.fatal and "'accuracy'" in outcome.error and "eval_loss" in outcome.error


@pytest.mark.parametrize("path", ["ftray.no_such:train", "ftray.testing.toy_train:missing", "train", ""])
def test_a_train_fn_that_is_not_there_is_one_line(path):
    with pytest.raises(ConfigError, match=r"train_fn: .* write `module:function`"):
        load_function(path)


def test_a_space_is_checked_against_the_recipe(recipe):
    plain = parse(Recipe, segment_recipe(search_of(8), recipe))
    Space({"optim.learning_rate": {"uniform": [0.1, 0.2]}, "adapt.r": {"int": [1, 4]}}).check(plain)
    cases = {
        "optim.learning_rte": ({"uniform": [0, 1]}, "did you mean `optim.learning_rate`"),
        "learning_rate": ({"uniform": [0, 1]}, "optim.learning_rate"),
        "adapt.rank": ({"choice": [2]}, "no such field"),
        "optim.weight_decay": ({"uniform": [-1, 1]}, "-1.0 is refused"),
        "adapt.r": ({"choice": [2, "four"]}, "'four' is refused"),
    }
    for path, (distribution, words) in cases.items():
        with pytest.raises(ConfigError) as caught:
            Space({path: distribution}).check(plain)
        message = str(caught.value)
        assert message.startswith(f"space.{path}: ") and words in message and "\n" not in message, message


def test_a_delta_outside_the_segment_is_an_invariant_broken(job, monkeypatch, tmp_path):
    elsewhere = SimpleNamespace(
        checkpoint=tmp_path / "elsewhere", delta=None, metrics={"eval_loss": 1.0}, tokens=1
    )
    monkeypatch.setattr(toy_train, "train", lambda *args, **kwargs: elsewhere)
    assert "elsewhere" in run_segment(job, SEGMENT).error


def test_a_full_disk_ends_the_search_and_not_the_member(job, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs rights this process lacks: {mounted.stderr.strip()}")
    try:
        (disk / "filler").write_bytes(b"0" * 60_000)
        with contextlib.suppress(OSError):
            (disk / "more").write_bytes(b"0" * 8192)
        full = replace(job, folder=str(disk / "search"))
        outcome = run_segment(full, SEGMENT)
        assert outcome.fatal and not outcome.retry and outcome.score is None
        assert "the disk is full; make room" in outcome.error and "\n" not in outcome.error
        (disk / "filler").unlink()
        weights = {"w": torch.zeros(50_000)}
        with monkeypatch.context() as patched:
            patched.setattr(toy_train, "train", lambda _, io, **more: save_file(weights, io.run_dir / "w"))
            outcome = run_segment(full, SEGMENT)  # safetensors has an error of its own
        assert outcome.fatal and "the disk is full; make room" in outcome.error
        shutil.rmtree(disk / "search")
        assert run_segment(full, SEGMENT).error == ""
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_segments_are_counted_in_validations_if_the_recipe_says_when(recipe):
    search = search_of(2)
    assert in_steps(search, recipe) == search
    counted = spec_replace(search, "segment_evaluations", 3)
    with pytest.raises(ConfigError, match="set its"):
        in_steps(counted, recipe)
    validating = spec_replace(recipe, "train.eval_steps", 4)
    assert in_steps(counted, validating).segment_steps == 12
    assert segment_recipe(in_steps(counted, validating), validating)["train"]["eval_steps"] == 4
    assert segment_recipe(search, validating)["train"]["eval_steps"] is None


def test_segments_counted_in_tokens_end_with_the_step_that_reaches_them(make_recipe, tmp_path):
    recipe = make_recipe(train__num_train_epochs=None)
    plain = segment_recipe(search_of(1, num_segments=2, segment_tokens=1000), recipe)
    assert plain["train"]["max_tokens"] == 2000 and plain["train"]["max_steps"] is None
    steps = []
    for batch in (2, 6):
        here = Job(str(tmp_path / f"batch-{batch}"), plain, TRAIN_FN, "loss", str(tmp_path))
        config = {"train.global_batch_size": batch}
        first = replace(SEGMENT, config=config, stop_at=1000)
        second = replace(first, name="m000-s001-xyz", segment=1, checkpoint=first.name, stop_at=2000)
        outcomes = [run_segment(here, segment) for segment in (first, second)]
        assert [outcome.error for outcome in outcomes] == ["", ""]
        counts = [read_records(here.path(segment.name) / "metrics.jsonl") for segment in (first, second)]
        seen = [record["tokens"] for records in counts for record in records if "tokens" in record]
        assert seen == sorted(seen) and sum(count < 1000 for count in seen) == len(counts[0]) - 2
        assert seen[-1] >= 2000 > seen[-2], "the last step is the one that reaches them"
        assert sum(outcome.tokens for outcome in outcomes) == seen[-1]
        steps.append(len(seen))
    assert steps[0] > 2 * steps[1]
    with pytest.raises(ConfigError, match="segment_tokens: also `segment_evaluations`"):
        search_of(2, segment_tokens=1000, segment_evaluations=1)


def test_what_a_segment_took_is_its_own_part(job):
    first = run_segment(job, SEGMENT)
    after = replace(SEGMENT, name="m001-s001-def", member=1, segment=1, checkpoint=SEGMENT.name, stop_at=8)
    assert (first.tokens, run_segment(job, after).tokens) == (40, 40)


def test_a_value_that_other_pieces_forbid_is_told_before_anything_runs(recipe):
    sharded = spec_replace(recipe, "strategy", {"type": "fsdp", "num_workers": 2})
    sharded = spec_replace(sharded, "adapt", "full")
    space = Space({"optim": {"choice": ["adamw", "muon"]}})
    space.check(parse(Recipe, segment_recipe(search_of(8), sharded)))
    with pytest.raises(ConfigError) as caught:
        space.check(parse(Recipe, segment_recipe(search_of(8, spread=True), sharded)))
    message = str(caught.value)
    assert message.startswith("space.optim: ") and "`muon`" in message and "`fsdp`" in message
    assert "\n" not in message


def test_a_field_that_is_a_list_is_searched_whole(make_recipe, corpus):
    """The weights of a mixture: what the recipe takes there, a choice may hold."""
    sources = [str(corpus["train"]), str(corpus["validation"])]
    recipe = make_recipe(data__train=sources)
    plain = parse(Recipe, segment_recipe(search_of(8), recipe))
    weights = [{sources[0]: 1.0, sources[1]: 1.0}, {sources[0]: 3.0, sources[1]: 1.0}]
    space = Space({"data.mixture": {"choice": weights}})
    space.check(plain)
    mixed = apply(plain, {"data.mixture": weights[1]})
    assert [entry.weight for entry in mixed.data.mixture] == [3.0, 1.0]
    assert space.mutable == [], "another mixture is another run"
    for path in ("data.mixture.weights", "data.mixture.0"):
        with pytest.raises(ConfigError, match="no such field"):
            Space({path: {"uniform": [0.1, 0.9]}}).check(plain)
