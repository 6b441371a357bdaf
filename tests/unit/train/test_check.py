"""What `ftray check` finds before a run does."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftray.core.errors import ConfigError, DataError, ModelError
from ftray.train.check import check_recipe
from tests.recipes import MakeRecipe


def test_a_sound_recipe(make_recipe: MakeRecipe) -> None:
    model, train, validation = check_recipe(make_recipe())
    assert "train (" in model
    assert "80 rows, 80 used, 0 filtered, 0 quarantined" in train and "targets" in train
    assert "16 rows" in validation


def test_a_row_without_targets_is_told(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": ""}\n' * 3)
    with pytest.raises(
        DataError, match=r"rows\.jsonl: 3 rows cannot be used; the first at line 1 \(byte 0\)"
    ):
        list(check_recipe(make_recipe(data__train=str(file))))


def test_too_long_rows_and_foreign_tokenizers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4096 is more than the model's 512 positions"):
        list(check_recipe(make_recipe(data__max_length=4096)))
    with pytest.raises(ModelError, match="not a model folder"):
        list(check_recipe(make_recipe(model__model_name_or_path=str(tmp_path))))


def test_rows_of_every_format_are_checked(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    pairs = [{"question": f"q{i}", "answer": "a"} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(pairs, indent=1))
    (tmp_path / "prose.txt").write_text("one\n\ntwo\n")
    train = [str(tmp_path / name) for name in ("rows.parquet", "rows.json", "prose.txt")]
    columns = {"prompt": "question", "completion": "answer"}
    recipe = make_recipe(data__train=train, data__columns=columns, data__validation=[])
    _, one, two, three = check_recipe(recipe)
    assert "20 rows, 20 used" in one and "20 rows, 20 used" in two and "1 rows, 1 used" in three
