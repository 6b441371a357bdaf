"""FSDP2 on one GPU with NCCL: the same code as on CPUs, and the same curve as one process on that GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ftray.config.recipe import Recipe
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(recipe: Recipe) -> list[float]:
    train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name))
    records = read_records(Path(recipe.output_dir) / recipe.name / "metrics.jsonl")
    return [record["loss"] for record in records if "grad_norm" in record]


@pytest.mark.parametrize("adapt", ["lora", "full"])
@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize(("bf16", "rounding"), [(False, 1e-4), (True, 2e-2)])
def test_equals_one_process(
    make_recipe: MakeRecipe, nccl: None, adapt: str, cpu_offload: bool, bf16: bool, rounding: float
) -> None:
    changes: dict[str, Any] = {"adapt": adapt, "train__bf16": bf16, "optim__learning_rate": 1e-3}
    strategy = {"type": "fsdp", "num_workers": 1, "cpu_offload": cpu_offload}
    expected = losses(make_recipe("single", **changes))
    assert losses(make_recipe("sharded", strategy=strategy, **changes)) == pytest.approx(
        expected, rel=rounding
    )
