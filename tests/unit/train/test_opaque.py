"""Trainers that are not ours: their rows, what they log, the delta they leave, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftray.config.load import load, write_resolved
from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError, DataError, TrainError
from ftray.core.spec import dump, parse
from ftray.data.order import Permutation
from ftray.delta import manifest
from ftray.model.identity import base_identity
from ftray.train.check import check_model
from ftray.train.equivalence import compare
from ftray.train.io import LocalIO
from ftray.train.plan import plan
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train

FINE_TUNE = {"type": "train_fn", "function": "tests.own_trainer:fine_tune"}


@pytest.fixture
def make_opaque(tiny_base: Path, corpus: dict[str, Path], tmp_path: Path) -> Any:
    def make(trainer: Any, **changes: Any) -> Recipe:
        tree = {
            "name": "own",
            "output_dir": str(tmp_path / "runs"),
            "model": {"model_name_or_path": str(tiny_base)},
            "data": {"train": str(corpus["train"])},
            "adapt": {"type": "lora", "r": 4},
            "strategy": "single",
            "train": {
                "max_steps": 6,
                "global_batch_size": 4,
                "per_device_train_batch_size": 4,
                "bf16": False,
            },
            "trainer": trainer,
        }
        return parse(Recipe, tree | changes)

    return make


def go(recipe: Recipe) -> Any:
    return train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name))


def test_a_function_of_the_users_own(
    make_opaque: Any, tiny_base: Path, corpus: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_opaque(FINE_TUNE)
    result = go(recipe)
    assert "not promised: rows are handed as they are read" in capsys.readouterr().err
    records = read_records(result.run_dir / "metrics.jsonl")
    losses = [record["loss"] for record in records if not record.get("final")]
    assert len(losses) == 6 and losses[-1] < losses[0] and records[-1]["final"]
    rows = [json.loads(line) for line in corpus["train"].read_text().splitlines()]
    order = Permutation(len(rows), recipe.seed, 0)(np.arange(6))
    assert [record["row"] for record in records[:6]] == [rows[index]["prompt"] for index in order]
    delta = manifest.read(result.delta)
    assert delta.kind == "low_rank" and delta.base.digest == base_identity(tiny_base)["digest"]
    assert delta.recipe["trainer"] == FINE_TUNE and delta.lineage.run == "own" and delta.lineage.data
    assert list(delta.lineage.sources) == [str(file) for file in recipe.data.train]
    assert delta.metrics["loss"] == pytest.approx(losses[-1])
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    ids = torch.arange(2, 40)[None]
    before = base(ids).logits
    assert (PeftModel.from_pretrained(base, result.delta)(ids).logits - before).abs().max() > 0.01
    assert result.rows["documents"] == len(rows)


def test_out_of_memory_is_told_in_one_line(make_opaque: Any) -> None:
    with pytest.raises(TrainError, match=r"^out of memory at .*in the trainer's own loop; .*need less$"):
        go(make_opaque({"type": "train_fn", "function": "tests.own_trainer:too_large"}))


def test_a_whole_model_is_a_delta_too(make_opaque: Any) -> None:
    result = go(make_opaque({"type": "train_fn", "function": "tests.own_trainer:whole_model"}, adapt="full"))
    assert manifest.read(result.delta).kind == "replacement"
    assert not AutoModelForCausalLM.from_pretrained(result.delta).model.norm.weight.any()


def test_the_example_of_grpo_runs(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    changes = [
        f"model.model_name_or_path={tiny_base}",
        f"output_dir={tmp_path}",
        "strategy=single",
        "train.max_steps=2",
        "train.save_steps=1",
        "train.global_batch_size=8",
        "trainer.max_completion_length=6",
        "trainer.reward=[examples.grpo.rewards:is_the_sum, tests.own_trainer:many_digits]",
        "trainer.num_generations=4",
        "trainer.beta=0.1",
        "trainer.args={temperature: 1.5}",
    ]
    recipe = load(Recipe, "examples/grpo/grpo.yaml", changes)
    result = go(recipe)
    records = read_records(result.run_dir / "metrics.jsonl")
    steps = [record for record in records if "reward" in record]
    assert [record["step"] for record in steps[:2]] == [1, 2]
    assert "rewards/is_the_sum/mean" in steps[0] and "rewards/many_digits/mean" in steps[0]
    assert result.step == 2 and manifest.read(result.delta).kind == "low_rank"
    assert (result.run_dir / "trainer" / "checkpoint-2").is_dir()
    # A longer run goes on from the trainer's own checkpoint.
    longer = load(Recipe, "examples/grpo/grpo.yaml", [*changes, "train.max_steps=3"])
    assert go(longer).step == 3
    records = read_records(result.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records if "reward" in record and not record.get("final")] == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    ("trainer", "changes", "message"),
    [
        (FINE_TUNE, {"objective": "sft"}, "objective: `train_fn` brings one of its own along; remove it"),
        (
            FINE_TUNE,
            {"strategy": "fsdp"},
            "strategy: `fsdp` spreads the model, and `train_fn` holds it whole",
        ),
        (
            FINE_TUNE | {"function": "tests.own_trainer:nowhere"},
            {},
            "trainer.function: 'tests.own_trainer:nowhere'",
        ),
        (FINE_TUNE | {"function": "tests.own_trainer:not_a_function"}, {}, "is no function"),
        ({"type": "trl_grpo", "reward": "nowhere:f"}, {}, "trainer.reward: 'nowhere:f' cannot be imported"),
        (
            {"type": "trl_grpo", "reward": "tests.own_trainer:many_digits", "args": {"temperatur": 1}},
            {},
            "GRPOConfig has no `temperatur`; did you mean `temperature`",
        ),
        (
            {"type": "trl_grpo", "reward": "tests.own_trainer:many_digits", "args": {"seed": 1}},
            {},
            "trainer.args: `seed` follows from the recipe; set it there",
        ),
        (
            {"type": "trl_grpo", "reward": "tests.own_trainer:many_digits", "num_generations": 3},
            {},
            "train.global_batch_size: 4 answers are no multiple of the 3",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    trainer: Any, changes: Any, message: str, make_opaque: Any
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_model(make_opaque(trainer, **changes))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_trainer_that_leaves_nothing(make_opaque: Any) -> None:
    with pytest.raises(TrainError, match="left neither an adapter nor a model here; call `save_pretrained`"):
        go(make_opaque({"type": "train_fn", "function": "tests.own_trainer:nothing"}))


def test_rows_that_cannot_be_used_are_counted(make_opaque: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "completion": "b", "extra": 1}\nnot json\n[1]\n' * 2)
    data = {"train": str(rows), "columns": {"prompt": "question"}, "max_quarantine": 0.9}
    result = go(make_opaque(FINE_TUNE, data=data))
    assert result.rows["quarantined"] == {"not JSON": 2, "not an object with fields": 2}
    with pytest.raises(DataError, match="4 of 6 rows cannot be used; most often: not"):
        go(make_opaque(FINE_TUNE, name="strict", data=data | {"max_quarantine": 0.1}))


def test_without_a_trainer_its_pieces_are_asked_for(make_opaque: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="objective: missing; give it a value"):
        make_opaque(None)
    recipe = make_opaque(FINE_TUNE)
    assert parse(Recipe, dump(recipe)) == recipe
    write_resolved(recipe, tmp_path / "recipe.yaml")
    assert load(Recipe, tmp_path / "recipe.yaml") == recipe


def test_what_knows_our_loop_only_says_so(make_opaque: Any) -> None:
    recipe = make_opaque(FINE_TUNE)
    for function in (plan, compare):
        with pytest.raises(ConfigError, match=r"trainer: .* knows our own loop only; remove it"):
            function(recipe)
    with pytest.raises(ConfigError, match="trainer: a search knows our own loop only"):
        train(recipe, LocalIO(Path(recipe.output_dir)), stop_at=3)


@pytest.mark.parametrize("limit", ["max_tokens", "max_time_s"])
def test_a_limit_that_other_trainers_do_not_heed_is_refused(make_opaque: Any, limit: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_steps: missing; a `trainer` heeds"):
        make_opaque(FINE_TUNE, train={limit: 100})
