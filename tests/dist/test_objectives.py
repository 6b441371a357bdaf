"""Objectives with models of their own (a reference, a teacher, a score head), and random weights, when sharded."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftray.config.recipe import Recipe
from ftray.core.spec import parse
from ftray.testing import tiny
from ftray.testing.ranks import on_ranks
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train

LORA = {"type": "lora", "r": 4}
CASES: dict[str, dict[str, Any]] = {
    "dpo-lora": {"objective": "dpo", "adapt": LORA},
    "dpo-full": {"objective": {"type": "dpo", "loss_type": "ipo"}},
    "reward-lora": {"objective": "reward", "adapt": LORA},
    "reward-full": {"objective": "reward"},
    "distill": {"objective": {"type": "distill", "beta": 0.5, "alpha": 0.1}},
    "random-start": {
        "model": {"init": "config", "config": {**tiny.ARCHITECTURES["llama"], "vocab_size": 258}},
        "objective": "sft",
    },
}
SPREAD = [("fsdp", name) for name in CASES] + [("ddp", "dpo-full"), ("ddp", "reward-lora")]


def recipe(folder: Path, name: str, strategy: Any, case: dict[str, Any]) -> Recipe:
    objective = case["objective"]
    rows = "plain" if name.endswith(("distill", "random-start")) else "pairs"
    if isinstance(objective, dict) and objective["type"] == "distill":
        objective = objective | {"teacher_model_name_or_path": str(folder / "teacher")}
    model = {"model_name_or_path": str(folder / "base")} | case.get("model", {})
    tree = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": model | {"tokenizer_name_or_path": str(folder / "base")},
        "data": {
            "train": str(folder / f"{rows}.jsonl"),
            "validation": str(folder / f"{rows}.jsonl"),
            "max_length": 64,
            "cache_dir": str(folder / "cache"),
        },
        "adapt": case.get("adapt", "full"),
        "objective": objective,
        "optim": {"type": "adamw", "learning_rate": 3e-3},
        "lr_scheduler": "constant",
        "strategy": strategy,
        # Rows do not divide: in some steps a rank has padding only.
        "train": {
            "max_steps": 3,
            "global_batch_size": 3,
            "per_device_train_batch_size": 1,
            "bf16": False,
        },
    }
    return parse(Recipe, tree)


def go(recipes: list[Recipe]) -> None:
    for one in recipes:
        train(one, LocalIO(Path(one.output_dir) / one.name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case alone and on two ranks."""
    folder = tmp_path_factory.mktemp("objectives")
    rows = [
        {"prompt": f"{word}-{i}\n#", "chosen": " " + word[0] * 30, "rejected": " no" * (i + 2)}
        for i in range(2)
        for word in ("alpha", "bravo", "charlie", "delta")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in rows)
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    tiny.tiny_base(folder / "base")
    tiny.tiny_base(folder / "teacher", "qwen3", seed=5)
    go([recipe(folder, f"single-{name}", "single", case) for name, case in CASES.items()])
    spread = [
        recipe(folder, f"{kind}-{name}", {"type": kind, "num_workers": 2}, CASES[name])
        for kind, name in SPREAD
    ]
    on_ranks(2, go, spread)
    return folder


def curve(folder: Path, name: str) -> list[float]:
    keys = ("loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/accuracies")
    found = read_records(folder / "runs" / name / "metrics.jsonl")
    return [record[key] for record in found for key in keys if key in record]


@pytest.mark.parametrize(("strategy", "case"), SPREAD)
def test_spread_equals_alone(folder: Path, strategy: str, case: str) -> None:
    expected = curve(folder, f"single-{case}")
    assert len(expected) >= 3 * 2 + 2
    assert curve(folder, f"{strategy}-{case}") == pytest.approx(expected, rel=1e-5, abs=1e-5)
