"""Two real Ray Train workers that shard the model go on with a run that one process began."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from ftray.train.io import LocalIO
from ftray.train.ray_launch import launch
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe

pytestmark = pytest.mark.ray

FSDP = {"type": "fsdp", "num_workers": 2, "cpus_per_worker": 0.5}


def losses(folder: Path) -> dict[int, float]:
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "grad_norm" in record}


@pytest.mark.slow
def test_two_workers_go_on_with_shards(make_recipe: MakeRecipe, ray_cluster: None) -> None:
    changes: dict[str, Any] = {"adapt": "full", "train__save_steps": 2, "optim__learning_rate": 1e-3}
    whole = make_recipe("whole", **changes)
    reference = train(whole, LocalIO(Path(whole.output_dir) / "whole"))
    begun = make_recipe("run", **changes)
    train(begun, LocalIO(Path(begun.output_dir) / "run"), stop_at=3)
    result = launch(make_recipe("run", strategy=FSDP, **changes), resume=True)
    assert losses(result.run_dir) == pytest.approx(losses(reference.run_dir), rel=1e-5)
    assert result.checkpoint is not None and result.delta is not None
    assert sorted(path.name for path in result.checkpoint.glob("trainable-*")) == [
        "trainable-0-of-2.safetensors",
        "trainable-1-of-2.safetensors",
    ]
    assert AutoModelForCausalLM.from_pretrained(result.delta).config.model_type == "llama"
    assert result.metrics["eval_loss"] == pytest.approx(reference.metrics["eval_loss"], rel=1e-5)
