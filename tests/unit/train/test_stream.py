"""Training while the rows are prepared: the same rows in the same order, bounded disk, errors told."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ftray.core.errors import ConfigError, DataError
from ftray.data import prepare
from ftray.data.grow import Background, GrowingShards
from ftray.data.prepare import Preparation
from ftray.data.read import Shards
from ftray.train.io import LocalIO
from ftray.train.worker import train
from tests.elastic import recorded
from tests.recipes import MakeRecipe

Change = dict[str, Any]


@pytest.fixture
def slow_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """Small units that take a while; the times at which they were done."""
    times: list[float] = []
    real = prepare.prepare_unit

    def slow(plan: Any, task: Any) -> Any:
        time.sleep(0.05)
        times.append(time.monotonic())
        return real(plan, task)

    monkeypatch.setattr(prepare, "UNIT_BYTES", 400)
    monkeypatch.setattr(prepare, "prepare_unit", slow)
    return times


def changes(tmp_path: Path, name: str, **more: Any) -> Change:
    return {
        "train__max_steps": 20,
        "train__save_steps": 5,
        "data__validation": [],
        "data__packing": False,
        "data__window_shards": 2,
        "data__cache_dir": str(tmp_path / f"cache-{name}"),
        "objective": {"type": "tests.elastic:Recording", "path": str(tmp_path / f"{name}.ids")},
        **more,
    }


def test_the_order_is_that_of_rows_prepared_before(
    make_recipe: MakeRecipe, tmp_path: Path, slow_units: list[float]
) -> None:
    before = make_recipe("before", **changes(tmp_path, "before"))
    result = train(before, LocalIO(tmp_path / "before"))
    slow_units.clear()
    begun = make_recipe("begun", **changes(tmp_path, "begun", data__stream=True))
    streamed = train(begun, LocalIO(tmp_path / "begun"))
    ids = recorded(tmp_path / "begun.ids.0", 2)
    assert len(ids) == 20 and ids == recorded(tmp_path / "before.ids.0", 2)
    first_step = (tmp_path / "begun.ids.0").stat()
    assert first_step.st_size and streamed.metrics == result.metrics
    assert streamed.rows["rows"] <= result.rows["rows"]


def test_training_starts_with_the_first_window(
    make_recipe: MakeRecipe, tmp_path: Path, slow_units: list[float]
) -> None:
    recipe = make_recipe("begun", **changes(tmp_path, "begun", data__stream=True))
    background = Background(Preparation(recipe.data, recipe.model.tokenizer))
    shards = GrowingShards(background.folder, recipe.data.window_shards)
    assert 2 <= len(slow_units) < 6 and not shards.is_complete
    rows = len(shards)
    assert shards.ensure(10**9) and shards.is_complete and len(shards) > 2 * rows
    background.close()
    whole = Shards(background.folder)
    assert whole.shards == shards.shards and whole.digest == shards.digest


def test_a_run_goes_on_in_mid_stream(
    make_recipe: MakeRecipe, tmp_path: Path, slow_units: list[float]
) -> None:
    train(make_recipe("before", **changes(tmp_path, "before")), LocalIO(tmp_path / "before"))
    recipe = make_recipe("begun", **changes(tmp_path, "begun", data__stream=True))
    train(recipe, LocalIO(tmp_path / "begun"), stop_at=7)
    train(recipe, LocalIO(tmp_path / "begun"))
    assert recorded(tmp_path / "begun.ids.0", 2) == recorded(tmp_path / "before.ids.0", 2)


def test_what_stops_the_preparation_is_told(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n' + "{\n" * 5)
    more = {"data__train": str(bad), "data__stream": True, "train__max_steps": 500}
    recipe = make_recipe("bad", **changes(tmp_path, "bad", **more))
    with pytest.raises(DataError, match="5 of 6 rows cannot be used"):
        train(recipe, LocalIO(tmp_path / "bad"))


def test_consumed_windows_are_dropped(
    make_recipe: MakeRecipe, tmp_path: Path, slow_units: list[float]
) -> None:
    settings = changes(tmp_path, "drop", data__stream=True, data__drop_consumed=True)
    recipe = make_recipe("drop", **settings)
    train(recipe, LocalIO(tmp_path / "run"), stop_at=15)
    kept = len(list(tmp_path.glob("cache-drop/shards/*/*.arrow")))
    assert kept <= len(slow_units) - 4, "60 rows are several windows"
    train(make_recipe("before", **changes(tmp_path, "before")), LocalIO(tmp_path / "before"))
    train(recipe, LocalIO(tmp_path / "run"))
    assert recorded(tmp_path / "drop.ids.0", 2) == recorded(tmp_path / "before.ids.0", 2)
    settings["train__max_steps"] = 100
    with pytest.raises(DataError, match=r"data\.drop_consumed: step \d+ needs rows a second time"):
        train(make_recipe("again", **settings), LocalIO(tmp_path / "again"))


def test_shards_that_others_use_are_not_dropped(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Another data set of the same rows, and one that has them among others."""
    before = make_recipe("before", **changes(tmp_path, "drop"))
    whole = Preparation(before.data, before.model.tokenizer).run()
    recipe = make_recipe("drop", **changes(tmp_path, "drop", data__stream=True, data__drop_consumed=True))
    result = train(recipe, LocalIO(tmp_path / "run"), stop_at=15)
    assert result.step == 15
    assert len(Shards(whole, verify=True)) > 0


def test_a_preparation_that_nobody_reads_waits_for_nobody(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "UNIT_BYTES", 400)
    settings = changes(tmp_path, "drop", data__stream=True, data__drop_consumed=True)
    recipe = make_recipe("drop", **settings)
    data, preparation = recipe.data, Preparation(recipe.data, recipe.model.tokenizer)
    shards = Shards(preparation.run())
    assert len(shards.shards) >= 3 * data.window_shards
    with pytest.raises(ConfigError, match="drop_consumed: a mixture comes back to every source"):
        make_recipe("mixed", data__drop_consumed=True, data__mixture={"a": 1})


def test_the_disk_is_bounded(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparation, which is faster here, waits for training."""
    monkeypatch.setattr(prepare, "UNIT_BYTES", 400)
    corpus = tmp_path / "long.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"row {i} of a long corpus"}) + "\n" for i in range(900)))
    held: list[int] = []
    real = prepare.prepare_unit

    def counting(plan: Any, task: Any) -> Any:
        held.append(len(list(tmp_path.glob("cache-drop/shards/*/*.arrow"))))
        return real(plan, task)

    monkeypatch.setattr(prepare, "prepare_unit", counting)
    settings = {"data__train": str(corpus), "data__stream": True, "data__drop_consumed": True}
    recipe = make_recipe("drop", **changes(tmp_path, "drop", **settings, train__max_steps=180))
    assert train(recipe, LocalIO(tmp_path / "run")).step == 180
    # Two windows of two shards ahead, the one under way, and five steps of four rows since the last checkpoint.
    assert len(held) > 70 and max(held) <= 14
    assert len(sum(recorded(tmp_path / "drop.ids.0", 2), [])) == 720  # noqa: RUF017


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__max_steps": None, "train__num_train_epochs": 1}, "num_train_epochs: with `data.stream`"),
        ({"data__mixture": {"a": 1}}, "stream: a mixture draws"),
    ],
)
def test_what_a_stream_cannot_do(make_recipe: MakeRecipe, change: Change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(data__stream=True, **change)


def test_streams_are_json(make_recipe: MakeRecipe, tmp_path: Path, slow_units: list[float]) -> None:
    """A window file holds what a reader needs and nothing of the other windows."""
    recipe = make_recipe("begun", **changes(tmp_path, "begun"))
    folder = Preparation(recipe.data, recipe.model.tokenizer).run()
    windows = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("window-2-*.json"))]
    shards = [shard for window in windows for shard in window["shards"]]
    assert len(windows) >= 3 and shards == Shards(folder).shards[: len(shards)]
