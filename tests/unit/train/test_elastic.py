"""The rows of a run, recorded where they are trained on, whatever becomes of the workers in between."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftray.config.recipe import Recipe
from ftray.core.errors import CheckpointError
from ftray.data import prepare
from ftray.data.order import PADDING
from ftray.data.read import Shards
from ftray.train.io import LocalIO
from ftray.train.worker import train
from tests.elastic import recorded
from tests.recipes import MakeRecipe

BATCH, MICRO, STEPS = 12, 2, 30
Change = dict[str, Any]


def elastic(make_recipe: MakeRecipe, name: str, **changes: Any) -> Recipe:
    settings: Change = {
        "train__max_steps": STEPS,
        "train__global_batch_size": BATCH,
        "train__per_device_train_batch_size": MICRO,
        "data__validation": [],
        "data__packing": False,
        "objective": {"type": "tests.elastic:Recording", "path": f"{name}.ids"},
    }
    return make_recipe(name, **{**settings, **changes})


def life(make_recipe: MakeRecipe, folder: Path, size: int, stop: int, **changes: Any) -> list[list[int]]:
    """Train on `size` ranks, one after the other, from the newest checkpoint to step `stop`; ids of every step."""
    run_dir = folder / "run"
    begun = max((int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*")), default=0)
    micro_batches = math.ceil(math.ceil(BATCH / size) / MICRO)
    parts = []
    for rank in reversed(range(size)):
        path = folder / f"rank{rank}"
        recipe = elastic(
            make_recipe,
            "run",
            strategy={"type": "tests.elastic:OneRank", "rank": rank, "size": size},
            objective=record(path),
            **changes,
        )
        start = run_dir / "checkpoints" / f"step-{begun:08d}" if begun else None
        io = LocalIO(run_dir if rank == 0 else folder / f"other{rank}")
        train(recipe, io, start_from=start, stop_at=stop)
        parts.append(recorded(Path(f"{path}.0"), micro_batches))
        Path(f"{path}.0").unlink()
    assert all(len(part) == stop - begun for part in parts)
    return [[row for part in reversed(parts) for row in part[step]] for step in range(stop - begun)]


def test_ids_at_the_optimiser_are_the_same_at_every_number_of_ranks(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six sizes, breaks at random steps, four windows: the same sequence, nothing missing, nothing twice."""
    monkeypatch.setattr(prepare, "UNIT_BYTES", 1000)
    windows: Change = {"data__window_shards": 1}
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    reference = life(make_recipe, tmp_path / "whole", 1, STEPS, **windows)
    draw = random.Random(3)
    stops = [*sorted(draw.sample(range(1, STEPS), 7)), STEPS]
    sizes = [1, 2, 3, 4, 6, 8, 2, 1]
    draw.shuffle(sizes)
    seen: list[list[int]] = []
    for size, stop in zip(sizes, stops, strict=True):
        steps = life(make_recipe, tmp_path / "parts", size, stop, **windows)
        seen += [[row for row in step if row != PADDING] for step in steps]
    assert seen == reference
    [folder] = tmp_path.glob("cache/train-*")
    rows = len(Shards(folder))
    assert len(Shards(folder).shards) >= 3
    flat = [row for step in seen for row in step]
    for start in range(0, len(flat) - rows + 1, rows):
        assert Counter(flat[start : start + rows]) == Counter(range(rows)), "0 missing, 0 repeated"
    assert len(flat) >= 4 * rows


def test_a_killed_step_is_taken_again(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Rows of steps that no checkpoint holds come again, in the same order."""
    whole = elastic(make_recipe, "whole", objective=record(tmp_path / "whole"), train__max_steps=10)
    train(whole, LocalIO(tmp_path / "whole"))
    reference = recorded(tmp_path / "whole.0", 6)
    parts = elastic(
        make_recipe, "parts", objective=record(tmp_path / "parts"), train__max_steps=10, train__save_steps=3
    )
    (tmp_path / "parts.breaks").write_text(str(6 * 7 + 3))
    with pytest.raises(KeyboardInterrupt):
        train(parts, LocalIO(tmp_path / "run"))
    assert recorded(tmp_path / "parts.0", 6) == reference[:7]
    (tmp_path / "parts.0").unlink(), (tmp_path / "parts.breaks").unlink()
    train(parts, LocalIO(tmp_path / "run"))
    assert recorded(tmp_path / "parts.0", 6) == reference[6:], "the newest checkpoint held six steps"


def record(path: Path) -> Change:
    return {"type": "tests.elastic:Recording", "path": str(path)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"`seed: 0`, now it is 1"),
        ({"train__global_batch_size": 8}, r"`train.global_batch_size: 12`, now it is 8"),
        ({"data__max_length": 64}, r"other training rows"),
        ({"data__window_shards": 3}, r"another `data.window_shards`"),
    ],
)
def test_changed_rows_are_refused_unless_accepted(
    make_recipe: MakeRecipe, tmp_path: Path, change: Change, named: str
) -> None:
    def recipe(**changes: Any) -> Recipe:
        return elastic(make_recipe, "run", objective="sft", train__max_steps=8, **changes)

    train(recipe(), LocalIO(tmp_path / "run"), stop_at=4)
    with pytest.raises(CheckpointError, match=named + ".*or go on all the same with `--accept-changed-data`"):
        train(recipe(**change), LocalIO(tmp_path / "run"))
    assert train(recipe(**change), LocalIO(tmp_path / "run"), accept_changed_data=True).step == 8


def test_another_batch_size_goes_on_at_the_next_row(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    objective = record(tmp_path / "ids")
    first = elastic(make_recipe, "run", objective=objective, train__max_steps=10)
    train(first, LocalIO(tmp_path / "run"), stop_at=3)
    second = elastic(make_recipe, "run", objective=objective, train__max_steps=10, train__global_batch_size=4)
    train(second, LocalIO(tmp_path / "run"), accept_changed_data=True)
    seen = [row for step in recorded(tmp_path / "ids.0", 1) for row in step]
    assert len(seen) == 3 * 12 + 7 * 4
    [folder] = tmp_path.glob("cache/train-*")
    assert len(set(seen)) == min(len(seen), len(Shards(folder)))
    assert np.array(seen).min() >= 0
