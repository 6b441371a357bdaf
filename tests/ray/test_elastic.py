"""Real workers, rows prepared while they train, and a change of their number: the ids stay what they were."""

import math
import random
from collections import Counter
from pathlib import Path

import pytest

from ftray.config.recipe import Recipe
from ftray.core.errors import FtrayError
from ftray.data import prepare
from ftray.data.order import PADDING
from ftray.data.read import Shards
from ftray.train.io import LocalIO
from ftray.train.ray_launch import launch
from ftray.train.worker import train
from tests.elastic import recorded
from tests.recipes import MakeRecipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STEPS, BATCH, MICRO, SAVE = 24, 5, 2, 4
Steps = list[list[int]]


def recipe_of(make_recipe: MakeRecipe, tmp_path: Path, name: str, **changes: object) -> Recipe:
    return make_recipe(
        name,
        train__max_steps=STEPS,
        train__global_batch_size=BATCH,
        train__per_device_train_batch_size=MICRO,
        train__save_steps=SAVE,
        data__validation=[],
        data__packing=False,
        data__window_shards=2,
        data__cache_dir=str(tmp_path / f"cache-{name}"),
        objective={"type": "tests.elastic:Recording", "path": str(tmp_path / f"{name}.ids")},
        **changes,
    )


def micro_batches(size: int) -> int:
    """Micro batches of a rank in a step."""
    return math.ceil(math.ceil(BATCH / size) / MICRO)


def take(tmp_path: Path, name: str, size: int) -> Steps:
    """Row ids of every whole step since the last call, the ranks' parts one after the other."""
    paths = [tmp_path / f"{name}.ids.{rank}" for rank in range(size)]
    parts = [recorded(path, micro_batches(size)) for path in paths]
    for path in paths:
        path.unlink()
    steps = zip(*parts, strict=False)
    return [[row for part in step for row in part if row != PADDING] for step in steps]


def life(
    make_recipe: MakeRecipe, tmp_path: Path, workers: int, on_ray: bool, break_at: int | None
) -> tuple[int, Steps]:
    """One start of the run, cut off in the middle of its step `break_at`; its first step, and the ids of all."""
    strategy = {"type": "ddp", "num_workers": workers, "max_failures": 0} if on_ray else "single"
    recipe = recipe_of(make_recipe, tmp_path, "run", strategy=strategy, data__stream=True)
    run_dir = Path(recipe.output_dir) / recipe.name
    begun = max((int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*")), default=0)
    breaks = tmp_path / "run.ids.breaks"
    if break_at is None:
        assert launch(recipe, resume=begun > 0).step == STEPS
        return begun, take(tmp_path, "run", workers)
    breaks.write_text(str(micro_batches(workers) * (break_at - begun) + 1))
    with pytest.raises((KeyboardInterrupt, FtrayError), match="worker group failed" if on_ray else None):
        launch(recipe, resume=begun > 0)
    breaks.unlink()
    return begun, take(tmp_path, "run", workers)


def check_ids(make_recipe: MakeRecipe, tmp_path: Path, lives: list[tuple[int, Steps]]) -> None:
    """Every life has the ids that a run without breaks has; those that count are all rows, none twice."""
    train(recipe_of(make_recipe, tmp_path, "reference"), LocalIO(tmp_path / "reference"))
    reference = take(tmp_path, "reference", 1)
    assert len(reference) == STEPS
    kept: Steps = []
    for begun, steps in lives:
        assert steps == reference[begun : begun + len(steps)]
        kept = kept[:begun] + steps
    assert kept == reference
    [folder] = (tmp_path / "cache-run").glob("train-*")
    rows, flat = len(Shards(folder)), [row for step in kept for row in step]
    assert len(flat) == STEPS * BATCH > rows
    for start in range(0, len(flat) - rows + 1, rows):
        assert Counter(flat[start : start + rows]) == Counter(range(rows)), "0 missing, 0 repeated"


def test_two_workers_then_one_at_random_breaks(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers that claim both CPUs while rows are prepared, then a process alone, cut off once more."""
    monkeypatch.setattr(prepare, "UNIT_BYTES", 400)
    draw = random.Random(11)
    lives = [life(make_recipe, tmp_path, 2, True, draw.randrange(SAVE + 2, 12))]
    lives += [life(make_recipe, tmp_path, 1, False, draw.randrange(13, 20))]
    lives += [life(make_recipe, tmp_path, 1, False, None)]
    assert len({begun for begun, _ in lives}) == 3
    check_ids(make_recipe, tmp_path, lives)


@pytest.mark.slow
def test_groups_of_two_one_and_two(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "UNIT_BYTES", 400)
    draw = random.Random(12)
    lives = [life(make_recipe, tmp_path, 2, True, draw.randrange(SAVE + 2, 12))]
    lives += [life(make_recipe, tmp_path, 1, True, draw.randrange(13, 20))]
    lives += [life(make_recipe, tmp_path, 2, True, None)]
    check_ids(make_recipe, tmp_path, lives)
