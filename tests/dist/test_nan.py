"""Numbers that are not finite on one rank alone: no rank moves, all of them do what the recipe says."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.config.recipe import Recipe
from ftray.core.errors import TrainError
from ftray.testing.ranks import on_ranks
from ftray.train import worker
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from tests.recipes import MakeRecipe

POLICIES, SPOILT = ("stop", "skip", "roll_back"), ("loss", "gradient")
KINDS = [
    *itertools.product(["ddp"], POLICIES, SPOILT),
    *zip(["fsdp"] * 3, POLICIES, ("gradient", "loss", "gradient"), strict=True),
]


def outcome(recipe: Recipe) -> dict[str, Any]:
    """What one rank saw: in which steps its parameters moved, and its error."""
    run_dir = Path(recipe.output_dir) / recipe.name
    seen: dict[str, Any] = {"error": None}
    inner = worker.one_step

    def watched(run: Any, progress: float) -> float:
        before = weights(run)
        try:
            return inner(run, progress)
        finally:
            seen["moved"] = [*seen.get("moved", []), not torch.equal(before, weights(run))]

    worker.one_step = watched
    try:
        worker.train(recipe, LocalIO(run_dir))
    except TrainError as error:
        seen["error"] = str(error)
    finally:
        worker.one_step = inner
    return seen


def weights(run: Any) -> torch.Tensor:
    parts = [
        getattr(p, "to_local", lambda p=p: p)().detach().reshape(-1) for p in run.engine.parameters.values()
    ]
    return torch.cat(parts).clone()


def cases(recipes: list[Recipe]) -> list[dict[str, Any]]:
    return [outcome(recipe) for recipe in recipes]


def test_one_rank_alone_is_not_finite(make_recipe: MakeRecipe) -> None:
    """Rank 1's loss is no number, or its gradient infinite, in its fourth step."""

    def recipe(strategy: str, policy: str, spoil: str, for_ever: bool = False) -> Recipe:
        name = f"{strategy}-{policy}-{spoil}{'-for-ever' if for_ever else ''}".replace("_", "-")
        once = "" if for_ever else str(Path(make_recipe().output_dir).parent / f"{name}.once")
        fault = {"type": "tests.faults:Faulty", "spoil": spoil, "rank": 1, "at": 4, "times": 99, "once": once}
        return make_recipe(
            name,
            strategy={"type": strategy, "num_workers": 2},
            objective=fault,
            train__nan_policy=policy,
            train__max_rollbacks=2,
            train__save_steps=2,
            train__max_steps=6,
            data__validation=[],
        )

    recipes = [recipe(*kind) for kind in KINDS] + [recipe("ddp", "roll_back", "loss", for_ever=True)]
    ranks = on_ranks(2, cases, recipes)
    for number, (_, policy, spoil) in enumerate(KINDS):
        run_dir = Path(recipes[number].output_dir) / recipes[number].name
        steps = [record for record in read_records(run_dir / "metrics.jsonl") if "grad_norm" in record]
        check(policy, spoil, ranks[0][number], ranks[1][number], steps)
    for rank in ranks:
        assert "after 2 returns to a checkpoint" in rank[-1]["error"]


def check(
    policy: str, spoil: str, one: dict[str, Any], two: dict[str, Any], steps: list[dict[str, Any]]
) -> None:
    assert one["moved"][:3] == two["moved"][:3] == [True] * 3
    if policy == "stop":
        assert one["moved"][3:] == two["moved"][3:] == [False]
        assert one["error"] == two["error"] and "step 4: " in one["error"]
        assert ("loss nan" in one["error"]) == (spoil == "loss")
    if policy == "skip":
        assert one["moved"] == two["moved"] == [True] * 3 + [False] + [True] * 2
        assert [record["skipped"] for record in steps] == [0, 0, 0, 1, 0, 0]
    if policy == "roll_back":
        # Back to step 2, then four more steps on the rows after the bad ones.
        assert len(one["moved"]) == len(two["moved"]) == 8 and one["error"] is None
        assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
        assert [record["rollbacks"] for record in steps] == [0, 0, 1, 1, 1, 1]
        assert all(math.isfinite(record["loss"]) for record in steps)


def test_the_rows_after_a_roll_back(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """One process: what a run that goes back trains on equals steps 1 and 2, then steps 5 and on."""

    def run(name: str, **changes: Any) -> list[float]:
        recipe = make_recipe(name, train__max_steps=6, data__validation=[], **changes)
        worker.train(recipe, LocalIO(Path(recipe.output_dir) / name))
        records = read_records(Path(recipe.output_dir) / name / "metrics.jsonl")
        return [record["loss"] for record in records if "grad_norm" in record]

    batch = {"train__global_batch_size": 2}  # one micro batch a step
    fault = {"type": "tests.faults:Faulty", "spoil": "loss", "at": 4, "once": str(tmp_path / "once")}
    curve = run("back", objective=fault, train__nan_policy="roll_back", train__save_steps=2, **batch)
    plain = run("plain", **batch)
    assert curve[:2] == plain[:2] and curve[2] != plain[2]
    # A rate of nothing: then the loss of each step says which rows it was.
    still = {"optim__learning_rate": 1e-30, **batch}
    (tmp_path / "once").unlink()
    back = run("still", objective=fault, train__nan_policy="roll_back", train__save_steps=2, **still)
    recipe = make_recipe("rows", train__max_steps=8, data__validation=[], **still)
    worker.train(recipe, LocalIO(tmp_path / "rows"))
    rows = [r["loss"] for r in read_records(tmp_path / "rows" / "metrics.jsonl") if "grad_norm" in r]
    assert back == pytest.approx(rows[:2] + rows[4:8], rel=1e-6)
