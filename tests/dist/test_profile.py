"""Traces of two ranks name the slower one."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ftray.config.recipe import Recipe
from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.objective.lm import SupervisedFineTuning
from ftray.testing.ranks import on_ranks
from ftray.train.io import LocalIO
from ftray.train.profile import summarise
from ftray.train.worker import train
from tests.recipes import MakeRecipe


@spec
class SlowOnOne(SupervisedFineTuning):
    """A machine of which one rank takes a tenth of a second more for every pass."""

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        if dist.get_rank() == 1:
            time.sleep(0.1)
        return super().sums(policy, batch)


def train_here(recipe: Recipe) -> Path:
    run_dir: Path = train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name)).run_dir
    return run_dir


def test_the_slow_rank_is_named(make_recipe: MakeRecipe) -> None:
    strategy = {"type": "ddp", "num_workers": 2}
    objective = {"type": "tests.dist.test_profile:SlowOnOne"}
    changes = {"strategy": strategy, "objective": objective, "train__profile_steps": 2, "train__max_steps": 5}
    run_dir, _ = on_ranks(2, train_here, make_recipe(**changes))
    assert {path.name for path in (run_dir / "profile").iterdir()} == {
        *(f"rank-{rank}.json" for rank in (0, 1)),
        *(f"rank-{rank}.trace.json.gz" for rank in (0, 1)),
    }
    *_, last = summarise(run_dir)
    assert "slowest is rank 1" in last and "aten::" in last, summarise(run_dir)
