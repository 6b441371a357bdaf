"""Read-time transforms in a run: the same rows at any number of ranks and after going on."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from ftray.core.errors import CheckpointError
from ftray.data.prepare import prepare_local
from ftray.train.feed import Feed
from ftray.train.io import LocalIO
from ftray.train.worker import train
from tests.elastic import OneRank
from tests.recipes import MakeRecipe

STEPS = 30
SMALL = {"data__validation": [], "data__packing": False, "data__window_shards": 2}


def learnt(make_recipe: MakeRecipe, size: int, begin: int = 0, **changes: Any) -> list[list[list[int]]]:
    """Labels of each row of each step, in the global order, put together from all ranks."""
    recipe = make_recipe(**SMALL, **changes)
    folder = prepare_local(recipe.data, recipe.model.tokenizer)
    steps: list[list[list[int]]] = [[] for _ in range(begin, STEPS)]
    for rank in range(size):
        feed = Feed(
            folder,
            None,
            OneRank(rank=rank, size=size),
            recipe.data,
            global_batch_size=6,
            micro_batch_size=2,
            seed=3,
        )
        feed.go_on(begin, begin * 6)
        for number, step in enumerate(range(begin, STEPS)):
            for batch in feed.batches(step):
                bounds = batch.cu_seq_lens.tolist()
                assert len(bounds) == len(batch.row_ids) + 1
                rows = [batch.labels[0, a:b].tolist() for a, b in pairwise(bounds)]
                steps[number] += [
                    row for row, index in zip(rows, batch.row_ids.tolist(), strict=True) if index >= 0
                ]
    return steps


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_are_the_same_at_every_number_of_ranks(
    make_recipe: MakeRecipe, corpus: dict[str, Any], mixed: bool
) -> None:
    changes: dict[str, Any] = {
        "data__transforms": ["clean", {"type": "goldfish", "choose": "random", "k": 2}]
    }
    if mixed:
        changes["data__train"] = [str(corpus["train"]), str(corpus["validation"])]
        changes["data__mixture"] = {str(corpus["train"]): 1, str(corpus["validation"]): 2}
    alone = learnt(make_recipe, 1, **changes)
    for size in (2, 3, 4):
        assert learnt(make_recipe, size, **changes) == alone
    assert learnt(make_recipe, 2, begin=17, **changes) == alone[17:], "gone on with"
    plain = learnt(make_recipe, 1, **{**changes, "data__transforms": ["clean"]})
    assert [len(step) for step in plain] == [len(step) for step in alone]
    counts = [sum(np.sum(np.array(row) != -100) for step in run for row in step) for run in (alone, plain)]
    assert 0.4 < counts[0] / counts[1] < 0.6
    if not mixed:  # 80 rows: step 13 begins a second epoch
        first, later = (
            {tuple(a): b for step in part for a, b in zip(plain[step], alone[step], strict=True)}
            for part in (range(13), range(14, 26))
        )
        assert any(first.get(row, drawn) != drawn for row, drawn in later.items()), (
            "another draw in each epoch"
        )


def test_a_run_trains_with_them_and_goes_on_only_with_the_same(
    make_recipe: MakeRecipe, tmp_path: Any
) -> None:
    steps = ["clean", {"type": "prompt_weight", "weight": 0.5}]
    result = train(
        make_recipe(data__transforms=steps, train__max_steps=2), LocalIO(tmp_path / "run"), stop_at=1
    )
    plain = train(
        make_recipe(data__transforms=["clean"], train__max_steps=2), LocalIO(tmp_path / "plain"), stop_at=1
    )
    assert result.metrics["loss"] != plain.metrics["loss"]
    assert torch.isfinite(torch.tensor(result.metrics["loss"]))
    with pytest.raises(CheckpointError, match="read-time transform"):
        train(make_recipe(data__transforms=["clean"], train__max_steps=2), LocalIO(tmp_path / "run"))
