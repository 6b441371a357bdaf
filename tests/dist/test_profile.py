"""Traces of two ranks name the slower one."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ftray.config.recipe import Recipe
from ftray.core.fs import read_json
from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.objective.lm import SupervisedFineTuning
from ftray.testing.ranks import on_ranks
from ftray.train.io import LocalIO
from ftray.train.profile import summarise, waited_us
from ftray.train.worker import train
from tests.recipes import MakeRecipe


@spec
class SlowOnOne(SupervisedFineTuning):
    """A machine of which one rank takes a tenth of a second more for every pass."""

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        if dist.get_rank() == 1:
            time.sleep(0.1)
        return super().sums(policy, batch)


def train_each(recipes: list[Recipe]) -> list[Path]:
    return [train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name)).run_dir for recipe in recipes]


def test_the_slow_rank_is_named(make_recipe: MakeRecipe) -> None:
    """Whether ranks wait in one collective or in gathers, scatters and a sum; of an earlier life nothing stays."""
    objective = {"type": "tests.dist.test_profile:SlowOnOne"}
    common = {"adapt": "full", "objective": objective, "train__profile_steps": 2, "train__max_steps": 5}
    recipes = [
        make_recipe(name, strategy={"type": name, "num_workers": 2}, **common) for name in ("ddp", "fsdp")
    ]
    for recipe in recipes:
        folder = Path(recipe.output_dir) / recipe.name / "profile"
        folder.mkdir(parents=True)
        (folder / "rank-2.json").write_text("{}")
    run_dirs, _ = on_ranks(2, train_each, recipes)
    for run_dir in run_dirs:
        assert {path.name for path in (run_dir / "profile").iterdir()} == {
            *(f"rank-{rank}.json" for rank in (0, 1)),
            *(f"rank-{rank}.trace.json.gz" for rank in (0, 1)),
        }
        *_, last = summarise(run_dir)
        assert "slowest is rank 1" in last and "aten::" in last, summarise(run_dir)
        ranks = [read_json(run_dir / "profile" / f"rank-{rank}.json") for rank in (0, 1)]
        # Two passes of each step take a tenth of a second more, which the other rank waits.
        assert ranks[0]["waited_s"] - ranks[1]["waited_s"] > 0.05, ranks


def test_layers_of_a_call_count_once_and_kinds_add_up() -> None:
    calls = [
        ("c10d::allreduce_", 3.0),
        ("gloo:all_reduce", 5.0),
        ("c10d::_allgather_base_", 2.0),
        ("gloo:_all_gather_base", 1.0),
        ("gloo:_reduce_scatter_base", 7.0),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 2.0),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 4.0),
    ]
    assert waited_us(calls) == 6.0 + 2.0 + 7.0
