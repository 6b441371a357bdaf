"""Whole runs of the preference and distillation objectives, and what they leave behind in plain libraries."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ftray.core.errors import ConfigError, DataError, ModelError
from ftray.model.build import load_model
from ftray.objective.reward import Reward
from ftray.testing import tiny
from ftray.train.check import check_model
from ftray.train.io import LocalIO
from ftray.train.worker import train
from tests.recipes import MakeRecipe


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The chosen answer says the prompt's first letter, the rejected one another."""
    folder = tmp_path_factory.mktemp("preferences")
    words = ["alpha", "bravo", "charlie", "delta"]
    rows = [
        {"prompt": f"{word}-{i}\n# Answer:", "chosen": " " + word[0] * 3, "rejected": " " + "z" * 3}
        for i in range(8)
        for word in words
    ]
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "validation")}
    paths["train"].write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    paths["validation"].write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    return {f"data__{name}": str(path) for name, path in paths.items()}


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapt", [{"type": "lora", "r": 4}, "full"], ids=["lora", "full"])
def test_dpo_prefers_the_chosen_answers(
    adapt: Any, preferences: dict[str, str], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    rate = 1e-3 if adapt == "full" else 1e-2
    recipe = make_recipe(
        **preferences,
        adapt=adapt,
        objective={"type": "dpo", "beta": 0.2},
        optim__learning_rate=rate,
        train__eval_steps=4,
        train__max_steps=8,
    )
    result = train(recipe, LocalIO(tmp_path / "run"))
    steps = [record for record in records(tmp_path / "run") if "rewards/margins" in record]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "the policy starts as its reference"
    assert steps[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert steps[-1]["loss"] < 0.5 and steps[-1]["rewards/accuracies"] == 1.0
    assert steps[-1]["rewards/margins"] == pytest.approx(
        steps[-1]["rewards/chosen"] - steps[-1]["rewards/rejected"], rel=1e-5
    )
    assert result.metrics["eval_loss"] < 0.6 and result.metrics["eval_rewards/accuracies"] > 0.9


def test_a_reward_adapter_loads_in_peft(
    preferences: dict[str, str], make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(**preferences, objective="reward", train__max_steps=8)
    result = train(recipe, LocalIO(tmp_path / "run"))
    assert result.metrics["loss"] < 0.3 and result.metrics["eval_rewards/accuracies"] == 1.0
    assert result.delta is not None
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, result.delta).eval()
    check_scores(model, result, tiny_base)


def test_a_reward_model_loads_in_transformers(
    preferences: dict[str, str], make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        **preferences, adapt="full", objective="reward", optim__learning_rate=1e-3, train__max_steps=8
    )
    result = train(recipe, LocalIO(tmp_path / "run"))
    assert result.delta is not None
    model, info = AutoModelForSequenceClassification.from_pretrained(
        result.delta, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    check_scores(model.eval(), result, tiny_base)
    with pytest.raises(ModelError, match="scores texts and is no language model"):
        load_model(result.delta)


@torch.no_grad()
def check_scores(model: Any, result: Any, base: Path) -> None:
    """The right answer has the higher score, by about what the run itself reports."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    margins = []
    for word in ("alpha", "bravo", "charlie", "delta"):
        texts = (f"{word}-0\n# Answer: {letters}<|end|>" for letters in (word[0] * 3, "zzz"))
        good, bad = (model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts)
        margins.append(good - bad)
    reported = result.metrics["eval_rewards/margins"]
    assert sum(margins) / 4 == pytest.approx(reported, rel=1e-3), margins


def test_distillation_draws_the_student_to_its_teacher(
    make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path
) -> None:
    teacher = tiny.tiny_base(tmp_path / "teacher", "qwen3", seed=5)
    objective = {"type": "distill", "teacher_model_name_or_path": str(teacher), "alpha": 0.1}
    recipe = make_recipe(objective=objective, train__max_steps=20, adapt="full", optim__learning_rate=3e-3)
    result = train(recipe, LocalIO(tmp_path / "run"))
    steps = [record for record in records(tmp_path / "run") if "loss/divergence" in record]
    assert steps[-1]["loss/divergence"] < 0.7 * steps[0]["loss/divergence"]
    assert steps[0]["loss"] == pytest.approx(steps[0]["loss/divergence"] + steps[0]["loss/nll"], rel=1e-5)
    assert result.delta is not None and AutoModelForCausalLM.from_pretrained(result.delta)


def test_mistakes_are_one_line_before_anything_is_trained(
    make_recipe: MakeRecipe, preferences: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="`dpo` compares answers, and the rows hold no `chosen`"):
        train(make_recipe(objective="dpo"), LocalIO(tmp_path / "a"))
    with pytest.raises(DataError, match="`sft` cannot compare the answers"):
        train(make_recipe(**preferences), LocalIO(tmp_path / "b"))
    other = tiny.tiny_base(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = make_recipe(objective={"type": "distill", "teacher_model_name_or_path": str(other)})
    with pytest.raises(ConfigError, match=r"teacher_model_name_or_path: .* has another tokenizer"):
        check_model(recipe)


def test_the_score_head_starts_from_its_own_seed(tiny_base: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        model = load_model(tiny_base)
        torch.manual_seed(len(heads))
        Reward().extend(model, seed)
        heads.append(model.score.weight)
        assert model.score.weight.requires_grad
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
