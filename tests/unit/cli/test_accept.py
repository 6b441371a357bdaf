"""`ftray run --resume` over other rows: refused by name, and gone on with when told to."""

from pathlib import Path

import pytest

from ftray.cli.main import main
from ftray.config.load import write_resolved
from tests.recipes import MakeRecipe


def test_accept_changed_data(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("run", train__max_steps=2)
    file = tmp_path / "recipe.yaml"
    write_resolved(recipe, file)

    def run(*words: str) -> int | None:
        try:
            main(["run", str(file), *words])
        except SystemExit as end:
            return int(end.code or 0)
        return None

    assert run() in (None, 0)
    capsys.readouterr()
    assert run("seed=7", "--resume") == 2
    told = capsys.readouterr().err
    assert "was made with `seed: 0`, now it is 7" in told and "`--accept-changed-data`" in told
    assert run("seed=7", "--resume", "--accept-changed-data") in (None, 0)
