"""The two forms of a search."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray.cli.main import main
from ftray.config.search import load_search
from ftray.testing.toy_train import RECIPE

SEARCH: dict[str, Any] = {
    "space": {"optim.learning_rate": {"uniform": [0.1, 0.2]}},
    "policy": "random",
    "num_members": 3,
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents = {
        "recipe": {**RECIPE, "output_dir": "kept", "data": {"train": "rows.jsonl"}},
        "space": SEARCH,
        "whole": {
            **SEARCH,
            "name": "toy-search",
            "output_dir": "kept",
            "recipe": str(tmp_path / "recipe.yaml"),
        },
        "bare": SEARCH["space"],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {name: tmp_path / f"{name}.yaml" for name in contents}


def test_a_recipe_and_its_space_are_the_search_of_one_file(files: dict[str, Path]) -> None:
    assert load_search(files["recipe"], files["space"]) == load_search(files["whole"])
    other = load_search(files["recipe"], files["space"], ["name=mine", "num_members=5"])
    assert (other.name, other.num_members) == ("mine", 5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recipe"], "is a recipe; name the file of the search's fields by --space"),
        (["whole", "--space", "space"], "is a search of its own, no recipe"),
        (["recipe", "--space", "whole"], "names a recipe too"),
        (["recipe", "--space", "bare"], "has no `space`"),
        (["recipe", "--space", "missing"], "no such file"),
    ],
)
def test_files_in_the_wrong_place_are_one_line(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tune", *(str(files.get(word, word)) for word in words)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and told in error and error.count("\n") == 1, error
