"""A snapshot under DeepSpeed takes the memory of the last one, and never memory that is still being written."""

from pathlib import Path

import torch

from ftray.config.recipe import Recipe
from ftray.testing.ranks import on_ranks
from ftray.train.io import LocalIO
from ftray.train.worker import begin
from tests.recipes import MakeRecipe


def pointers(snapshot: object) -> dict[str, int]:
    files = snapshot.files  # type: ignore[attr-defined]
    return {f"{kind} {name}": t.data_ptr() for kind in files for name, t in files[kind].items() if t.ndim}


def snapshots(recipe: Recipe, folder: Path) -> None:
    """Four of one engine; every rank checks its own."""
    run = begin(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), None)
    strategy, engine = recipe.strategy, run.engine

    def take(*, copy: bool = True) -> object:
        engine.step(run.feed.batches(0), 1.0)
        return strategy.snapshot(engine.parameters, engine.optimizers, copy=copy)

    first = take()
    values = {name: t.clone() for name, t in first.files["trainable"].items()}  # type: ignore[attr-defined]
    second = take()  # the first is not written yet
    assert pointers(first).keys() == pointers(second).keys()
    assert not set(pointers(first).values()) & set(pointers(second).values())
    for name, value in values.items():
        assert torch.equal(value, first.files["trainable"][name])  # type: ignore[attr-defined]
    folder.mkdir(exist_ok=True)
    second.write(folder)  # type: ignore[attr-defined]
    third = take()
    assert pointers(third) == pointers(second), "fresh memory"
    live = take(copy=False)
    fourth = take()
    for kind in ("trainable", "optimizer"):
        assert live.files[kind].keys() == fourth.files[kind].keys()  # type: ignore[attr-defined]
    run.checkpoints.close()
    run.io.close()


def test_memory_is_used_again(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    strategy = {"type": "deepspeed", "zero_stage": 2, "num_workers": 2}
    on_ranks(2, snapshots, make_recipe(adapt="full", strategy=strategy), tmp_path / "files")
