"""What people expect of a run: averages, early stopping, speed, traces."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ftray.core.errors import ConfigError
from ftray.optim.ema import Ema, averaged
from ftray.train.io import LocalIO
from ftray.train.profile import summarise
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe


def run(recipe: Any, **settings: Any) -> Any:
    return train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), **settings)


def records(recipe: Any) -> list[dict[str, Any]]:
    return read_records(Path(recipe.output_dir) / recipe.name / "metrics.jsonl")


def test_the_average_is_torchs() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = Ema(model.parameters(), 0.9)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ours.step()
        theirs.update_parameters(model)
    last = [parameter.clone() for parameter in model.parameters()]
    with averaged(model, [ours]):
        for mine, expected in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), last, strict=True))


def test_averages_go_on_exactly_and_are_published_by_choice(make_recipe: MakeRecipe) -> None:
    changes: dict[str, Any] = {"adapt": "full", "train__ema_decay": 0.8, "train__max_steps": 6}
    whole = run(make_recipe("whole", **changes, train__eval_steps=2))
    parts = make_recipe("parts", **changes, train__eval_steps=2)
    run(parts, stop_at=3)
    again = run(parts)
    last = run(make_recipe("last", **changes, train__publish_ema=False))
    plain = run(make_recipe("plain", **(changes | {"train__ema_decay": None})))
    weights = {
        name: load_file(result.delta / "model.safetensors")
        for name, result in {"whole": whole, "again": again, "last": last, "plain": plain}.items()
    }
    for name, tensor in weights["whole"].items():
        assert torch.equal(tensor, weights["again"][name]), name
        assert torch.equal(weights["last"][name], weights["plain"][name]), name
    assert any(not torch.equal(tensor, weights["last"][name]) for name, tensor in weights["whole"].items())
    # The average neither disturbs training nor is it disturbed by validation in between.
    assert whole.metrics["loss"] == plain.metrics["loss"]
    assert whole.metrics["eval_loss"] != plain.metrics["eval_loss"] == last.metrics["eval_loss"]


def test_early_stopping_counts_through_a_restart(make_recipe: MakeRecipe) -> None:
    # No rate, no gain: the first validation is the best, the next two are none.
    changes: dict[str, Any] = {
        "optim__learning_rate": 1e-12,
        "train__max_steps": 30,
        "train__eval_steps": 2,
        "train__save_steps": 1,
        "train__early_stopping_patience": 2,
        "train__early_stopping_threshold": 1e-3,
    }
    assert run(make_recipe("whole", **changes)).step == 6
    parts = make_recipe("parts", **changes)
    assert run(parts, stop_at=5).step == 5
    assert run(parts).step == 6
    assert run(parts).step == 6  # and is over for good
    learns = make_recipe("learns", **(changes | {"optim__learning_rate": 1e-2, "train__max_steps": 8}))
    assert run(learns).step == 8


def test_early_stopping_needs_something_to_judge_by(make_recipe: MakeRecipe) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.early_stopping_patience: nothing is validated .*eval_steps"
    ):
        make_recipe(train__early_stopping_patience=2)
    with pytest.raises(ConfigError, match="there are no rows to validate on"):
        make_recipe(train__early_stopping_patience=2, train__eval_steps=1, data__validation=[])


def test_records_say_how_fast_and_how_long(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train__max_steps=5)
    run(recipe)
    steps = [record for record in records(recipe) if "grad_norm" in record]
    for record in steps:
        assert 0 < record["fraction_of_peak"] < 1 and record["step_tokens_per_s"] > 0
        assert 0.05 < record["memory_gib"] < 64
    assert "eta_s" not in steps[0] and all(record["eta_s"] > 0 for record in steps[1:-1])
    assert steps[-1]["eta_s"] == 0


def test_a_trace_names_the_costliest_operation(make_recipe: MakeRecipe) -> None:
    result = run(make_recipe(train__profile_steps=2, train__max_steps=6))
    summary = json.loads((result.run_dir / "profile" / "rank-0.json").read_text())
    assert summary["steps"] == 2 and summary["waited_s"] == 0
    assert 0 < summary["all_ops_s"] < 1.2 * summary["step_s"]
    first, last = summarise(result.run_dir)
    assert "rank 0" in first and "most of its time is in aten::" in last
    assert (result.run_dir / "profile" / "rank-0.trace.json.gz").stat().st_size > 10_000


def test_a_run_too_short_for_a_trace(make_recipe: MakeRecipe) -> None:
    short = run(make_recipe("short", train__profile_steps=3, train__max_steps=2))
    assert "ended before a step was traced" in summarise(short.run_dir)[0]
    cut = run(make_recipe("cut", train__profile_steps=30, train__max_steps=4))
    assert json.loads((cut.run_dir / "profile" / "rank-0.json").read_text())["steps"] == 2


def test_recomputed_layers_change_no_number(make_recipe: MakeRecipe) -> None:
    kept = make_recipe("kept", adapt="full")
    again = make_recipe("again", adapt="full", train__gradient_checkpointing=True)
    run(kept), run(again)
    losses = [[record["loss"] for record in records(recipe)] for recipe in (kept, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
