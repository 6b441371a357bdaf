"""The main path in one process."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftray.core.errors import CheckpointError, TrainError
from ftray.delta import manifest
from ftray.model.build import load_model
from ftray.model.identity import base_identity
from ftray.testing import tiny
from ftray.train.checkpoint import read_manifest
from ftray.train.io import LocalIO
from ftray.train.ray_launch import launch
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe


def run(recipe: Any, **settings: Any) -> Any:
    return train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), **settings)


def losses(recipe: Any) -> list[float]:
    records = read_records(Path(recipe.output_dir) / recipe.name / "metrics.jsonl")
    return [record["loss"] for record in records if "grad_norm" in record]


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_learns_and_leaves_everything_behind(make_recipe: MakeRecipe, adapt: str, tiny_base: Path) -> None:
    recipe = make_recipe(adapt=adapt, train__max_steps=25, lr_scheduler={"type": "cosine", "warmup_steps": 3})
    result = run(recipe)
    curve = losses(recipe)
    assert len(curve) == 25 and curve[-1] < 0.5 * curve[0]
    assert result.metrics["eval_loss"] < 0.5 * curve[0]
    folder = result.run_dir
    for name in ("recipe.yaml", "metrics.jsonl", "loss.png", "tensorboard", "result.json", "delta/README.md"):
        assert (folder / name).exists(), name
    delta = manifest.read(result.delta)
    assert delta.base.digest == base_identity(tiny_base)["digest"]
    assert delta.kind == ("low_rank" if adapt == "lora" else "replacement")
    assert delta.lineage.data and delta.metrics["eval_loss"] == result.metrics["eval_loss"]


def test_delta_loads_in_plain_peft_and_transformers(make_recipe: MakeRecipe, tiny_base: Path) -> None:
    ids = torch.randint(2, 250, (1, 20), generator=torch.Generator().manual_seed(1))
    lora = run(make_recipe("lora"))
    full = run(make_recipe("full", adapt="full"))
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, lora.delta)(ids).logits
        replaced = AutoModelForCausalLM.from_pretrained(full.delta)(ids).logits
        ours = load_model(full.delta)(ids).logits
    assert (tuned - before).abs().max() > 0.01 and (replaced - before).abs().max() > 0.01
    torch.testing.assert_close(ours, replaced, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_changes_nothing_but_rounding(make_recipe: MakeRecipe, micro: int) -> None:
    reference = make_recipe("reference", train__per_device_train_batch_size=4)
    other = make_recipe(f"micro{micro}", train__per_device_train_batch_size=micro)
    run(reference), run(other)
    assert losses(other) == pytest.approx(losses(reference), rel=1e-5)


def test_reruns_are_bit_equal(make_recipe: MakeRecipe) -> None:
    one, two = make_recipe("one", adapt__lora_dropout=0.1), make_recipe("two", adapt__lora_dropout=0.1)
    run(one), run(two)
    assert losses(one) == losses(two)


@pytest.mark.parametrize("stop", [2, 5])
def test_goes_on_as_if_never_stopped(make_recipe: MakeRecipe, stop: int) -> None:
    changes: dict[str, Any] = {"adapt__lora_dropout": 0.1, "train__save_steps": 1, "train__max_steps": 8}
    changes["lr_scheduler"] = "linear"
    whole, parts = make_recipe("whole", **changes), make_recipe("parts", **changes)
    run(whole)
    assert run(parts, stop_at=stop).step == stop
    assert run(parts).step == 8
    assert losses(parts) == losses(whole)


def test_start_from_a_donor_with_another_rate(make_recipe: MakeRecipe) -> None:
    donor = run(make_recipe("donor"), stop_at=3)
    same = make_recipe("same")
    faster = make_recipe("faster", optim__learning_rate=5e-2)
    whole = make_recipe("whole")
    run(whole), run(same, start_from=donor.checkpoint), run(faster, start_from=donor.checkpoint)
    assert losses(same) == losses(whole)[3:]
    assert losses(faster)[0] == losses(same)[0] and losses(faster)[1] != losses(same)[1]


def test_launch_refuses_to_run_over_a_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    launch(recipe)
    with pytest.raises(CheckpointError, match="holds a run already; use `--resume`"):
        launch(recipe)
    assert launch(recipe, resume=True).step == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim__learning_rate": 1.0}, r"with `optim.learning_rate: 0\.01`, now it is 1\.0; give .* `name`"),
        ({"adapt__r": 8}, r"with `adapt.r: 4`, now it is 8;"),
        ({"train__max_grad_norm": None}, r"with `train.max_grad_norm: 1\.0`, now it is None;"),
        ({"lr_scheduler": "cosine"}, r"with `lr_scheduler.type: constant`, now it is cosine;"),
    ],
)
def test_resume_of_another_recipe_is_refused(
    make_recipe: MakeRecipe, change: dict[str, Any], message: str
) -> None:
    launch(make_recipe())
    with pytest.raises(CheckpointError, match=message):
        launch(make_recipe(**change), resume=True)


def test_a_finished_run_is_made_longer(make_recipe: MakeRecipe) -> None:
    """Under a schedule that does not look at the end; the curve is that of a run as long from the start."""
    schedule = {"type": "constant", "warmup_steps": 2}
    whole = make_recipe("whole", lr_scheduler=schedule, train__max_steps=9)
    run(whole)
    assert launch(make_recipe("parts", lr_scheduler=schedule, train__max_steps=5)).step == 5
    longer = make_recipe("parts", lr_scheduler=schedule, train__max_steps=9)
    assert launch(longer, resume=True).step == 9
    assert losses(longer) == losses(whole)


@pytest.mark.parametrize("schedule", ["linear", {"type": "constant", "warmup_ratio": 0.2}])
def test_a_schedule_over_the_length_cannot_be_made_longer(make_recipe: MakeRecipe, schedule: Any) -> None:
    launch(make_recipe(lr_scheduler=schedule, train__max_steps=2))
    message = (
        r"`train.max_steps: 2`, now it is 4, and the learning rate of `(linear|constant)` follows the length"
    )
    with pytest.raises(CheckpointError, match=message):
        launch(make_recipe(lr_scheduler=schedule, train__max_steps=4), resume=True)


def test_damaged_checkpoint_is_passed_over(make_recipe: MakeRecipe) -> None:
    changes: dict[str, Any] = {"train__save_steps": 2, "train__save_total_limit": 3}
    run(make_recipe("whole", **changes))
    recipe = make_recipe("hurt", **changes)
    result = run(recipe, stop_at=4)
    file = result.checkpoint / "trainable-0-of-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="not what was committed"):
        again = run(recipe)
    assert again.step == 6 and losses(recipe) == losses(make_recipe("whole", **changes))
    kept = sorted(path.name for path in result.checkpoint.parent.glob("step-*"))
    assert kept == ["step-00000002", "step-00000004", "step-00000006"]
    for name in kept:
        read_manifest(result.checkpoint.parent / name)  # raises for a damaged one


def test_damaged_last_checkpoint_is_written_again(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train__save_steps=3)
    first = run(recipe)
    file = first.checkpoint / "optimizer-0-of-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    litter = first.checkpoint.parent / ".tmp-step-00000009-dead"
    litter.mkdir()
    with pytest.warns(UserWarning, match="not what was committed"):
        again = run(recipe)
    assert again.checkpoint == first.checkpoint and again.metrics == first.metrics and not litter.exists()
    read_manifest(again.checkpoint)
    records = read_records(again.run_dir / "metrics.jsonl")
    assert sum(bool(record.get("final")) for record in records) == 1


def test_resume_over_another_base_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    base = tiny.tiny_base(tmp_path / "base", seed=1)
    recipe = make_recipe(model__model_name_or_path=str(base))
    run(recipe, stop_at=2)
    moved = base.rename(tmp_path / "moved")
    assert run(make_recipe(model__model_name_or_path=str(moved)), stop_at=4).step == 4
    tiny.tiny_base(base, seed=2)
    with pytest.raises(CheckpointError, match=r"other weights \(`model.model_name_or_path`\)"):
        run(recipe)


@pytest.mark.parametrize("optim", ["muon", "adamw"])
@pytest.mark.parametrize("bf16", [True, "auto"])
def test_bf16_goes_on_as_if_never_stopped(make_recipe: MakeRecipe, optim: str, bf16: bool | str) -> None:
    changes: dict[str, Any] = {"optim": {"type": optim}, "adapt": "full", "train__bf16": bf16}
    whole, parts = make_recipe("whole", **changes), make_recipe("parts", **changes)
    first = run(parts, stop_at=3)
    # `auto` may decide either way; a resumed run keeps what it began with.
    whole = make_recipe("whole", **{**changes, "train__bf16": first.bf16})
    assert run(whole).bf16 == run(parts).bf16
    assert losses(parts) == losses(whole)


@pytest.mark.filterwarnings("ignore:step .*eval_loss is:UserWarning")
def test_infinite_loss_moves_nothing(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(objective={"type": "tests.slow_objective:Infinite"}, train__nan_policy="skip")
    records = read_records(run(recipe).run_dir / "metrics.jsonl")
    assert [record["skipped"] for record in records if "skipped" in record] == [1] * 6
    assert records[0]["loss"] is None and math.isfinite(records[0]["grad_norm"])


def test_validation_is_logged_whenever_it_is_made(make_recipe: MakeRecipe) -> None:
    changes = {"train__eval_steps": 2, "train__logging_steps": 3, "train__max_steps": 8}
    records = read_records(run(make_recipe(**changes)).run_dir / "metrics.jsonl")
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4, 6, 8]


def test_one_tracker_by_name(make_recipe: MakeRecipe) -> None:
    assert make_recipe(tracking="wandb").tracking == make_recipe(tracking=["wandb"]).tracking


@pytest.mark.filterwarnings("ignore:step .*eval_loss is:UserWarning")
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_not_finite_moves_nothing(make_recipe: MakeRecipe, policy: str) -> None:
    # A learning rate that overflows float32 within a step or two.
    recipe = make_recipe(optim__learning_rate=1e30, train__nan_policy=policy, train__max_grad_norm=None)
    if policy == "stop":
        with pytest.raises(TrainError, match=r"not finite; lower `optim\.learning_rate`"):
            run(recipe)
    else:
        run(recipe)
        records = read_records(Path(recipe.output_dir) / recipe.name / "metrics.jsonl")
        assert sum(record.get("skipped", 0) for record in records) >= 3


def test_clock_bounds_the_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train__max_steps=None, train__max_time_s=1.0, lr_scheduler="linear")
    result = run(recipe)
    records = read_records(result.run_dir / "metrics.jsonl")
    assert 1.0 <= records[-2]["elapsed_s"] < 3.0 and result.step > 3
    rates = [record["learning_rate"] for record in records[:-1]]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2 * rates[0]


def test_rows_of_zero_weight_at_the_end_of_an_odd_batch(make_recipe: MakeRecipe) -> None:
    result = run(make_recipe(train__global_batch_size=3, train__per_device_train_batch_size=2))
    assert math.isfinite(result.metrics["loss"])


def test_wandb_offline(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run(make_recipe(tracking=["wandb"], train__max_steps=2))
    assert list((result.run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


def test_metrics_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert [record["step"] for record in read_records(path)] == [1]


def test_tokens_bound_the_run(make_recipe: MakeRecipe) -> None:
    limits = {"train__max_steps": None, "train__num_train_epochs": None, "train__max_tokens": 1500}
    result = run(make_recipe(**limits, lr_scheduler="linear"))
    records = [r for r in read_records(result.run_dir / "metrics.jsonl") if "tokens" in r]
    assert records[-1]["tokens"] == result.tokens >= 1500 > records[-2]["tokens"]
    rates = [record["learning_rate"] for record in records]
    assert rates == sorted(rates, reverse=True)
    half = make_recipe(**limits, lr_scheduler="linear", name="half")
    assert 700 <= run(half, stop_at=700).tokens < 1500
    again = run(half)
    assert (again.step, again.tokens) == (result.step, result.tokens)
    assert again.metrics["loss"] == result.metrics["loss"]
