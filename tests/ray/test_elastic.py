"""Real workers, rows prepared while they train, and a change of their number: the ids stay what they were."""

import math
from pathlib import Path

import pytest

from ftray.config.recipe import Recipe
from ftray.core.errors import FtrayError
from ftray.data import prepare
from ftray.data.order import PADDING
from ftray.train.io import LocalIO
from ftray.train.ray_launch import launch
from ftray.train.worker import train
from tests.elastic import recorded
from tests.recipes import MakeRecipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STEPS, BATCH, MICRO = 24, 5, 2


def recipe_of(make_recipe: MakeRecipe, tmp_path: Path, name: str, **changes: object) -> Recipe:
    return make_recipe(
        name,
        train__max_steps=STEPS,
        train__global_batch_size=BATCH,
        train__per_device_train_batch_size=MICRO,
        train__save_steps=4,
        data__validation=[],
        data__packing=False,
        data__window_shards=2,
        data__cache_dir=str(tmp_path / f"cache-{name}"),
        objective={"type": "tests.elastic:Recording", "path": str(tmp_path / f"{name}.ids")},
        **changes,
    )


def take(tmp_path: Path, name: str, size: int) -> list[list[int]]:
    """Row ids of every whole step since the last call, the ranks' parts one after the other."""
    micro_batches = math.ceil(math.ceil(BATCH / size) / MICRO)
    paths = [tmp_path / f"{name}.ids.{rank}" for rank in range(size)]
    parts = [recorded(path, micro_batches) for path in paths]
    for path in paths:
        path.unlink()
    steps = zip(*parts, strict=False)
    return [[row for part in step for row in part if row != PADDING] for step in steps]


@pytest.mark.slow
def test_two_workers_then_one_on_rows_that_are_being_prepared(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers that claim both CPUs, broken in the middle of a step; one worker goes on."""
    monkeypatch.setattr(prepare, "UNIT_BYTES", 400)
    train(recipe_of(make_recipe, tmp_path, "reference"), LocalIO(tmp_path / "reference"))
    reference = take(tmp_path, "reference", 1)
    assert len(reference) == STEPS

    def streamed(workers: int) -> Recipe:
        strategy = {"type": "ddp", "num_workers": workers, "max_failures": 0}
        return recipe_of(make_recipe, tmp_path, "run", strategy=strategy, data__stream=True)

    breaks = tmp_path / "run.ids.breaks"
    breaks.write_text(str(2 * 10 + 1))
    with pytest.raises(FtrayError, match="worker group failed"):
        launch(streamed(2))
    breaks.unlink()
    first = take(tmp_path, "run", 2)
    assert len(first) >= 10 and first == reference[: len(first)]
    result = launch(streamed(1), resume=True)
    second = take(tmp_path, "run", 1)
    assert result.step == STEPS and second == reference[8:], "the newest checkpoint held eight steps"
