"""Trainers that are not ours in two Ray Train workers."""

from pathlib import Path

import pytest

from ftray.config.load import load
from ftray.config.recipe import Recipe
from ftray.core.errors import CheckpointError, ConfigError
from ftray.core.spec import parse
from ftray.delta import manifest
from ftray.train.ray_launch import launch
from ftray.train.track.jsonl import read_records

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DDP = {"type": "ddp", "num_workers": 2, "cpus_per_worker": 0.5, "max_failures": 0}


def test_a_function_of_the_users_own(
    tiny_base: Path, corpus: dict[str, Path], tmp_path: Path, ray_cluster: None
) -> None:
    tree = {
        "name": "own",
        "output_dir": str(tmp_path),
        "model": {"model_name_or_path": str(tiny_base)},
        "data": {"train": str(corpus["train"])},
        "adapt": "lora",
        "strategy": DDP,
        "train": {"max_steps": 6},
        "trainer": {"type": "train_fn", "function": "tests.own_trainer:fine_tune"},
    }
    result = launch(parse(Recipe, tree))
    assert result.delta is not None and manifest.read(result.delta).kind == "low_rank"
    records = read_records(result.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 6]
    assert records[5]["loss"] < records[0]["loss"] and result.checkpoint is None
    with pytest.raises(CheckpointError, match="holds a run already"):
        launch(parse(Recipe, tree))
    with pytest.raises(ConfigError, match="cannot be imported"):
        launch(
            parse(Recipe, tree | {"trainer": {"type": "train_fn", "function": "tests.nowhere:f"}}),
            resume=True,
        )


def test_grpo(tiny_base: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    changes = [
        f"model.model_name_or_path={tiny_base}",
        f"output_dir={tmp_path}",
        "strategy.cpus_per_worker=0.5",
        "train.max_steps=2",
        "train.global_batch_size=8",
        "train.per_device_train_batch_size=4",
        "trainer.max_completion_length=6",
        "trainer.num_generations=4",
    ]
    result = launch(load(Recipe, "examples/grpo/grpo.yaml", changes))
    assert result.step == 2 and result.delta is not None
    assert manifest.read(result.delta).lineage.run == "grpo"
    assert "reward" in read_records(result.run_dir / "metrics.jsonl")[0]
