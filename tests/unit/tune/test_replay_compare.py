"""What counts as the same weights."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ftray.cli.main import main
from ftray.config.tune import TuneConfig
from ftray.core.spec import parse
from ftray.tune.local import run_local
from ftray.tune.replay import is_rounding
from tests.recipes import MakeRecipe


def test_one_changed_bit_of_a_trial_is_another_result(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "name": "search",
        "output_dir": str(tmp_path),
        "recipe": "recipe.yaml",
        "space": {"optim.learning_rate": {"loguniform": [1e-3, 3e-2]}},
        "policy": "random",
        "num_members": 1,
        "num_segments": 1,
        "segment_steps": 2,
    }
    result = run_local(parse(TuneConfig, settings), make_recipe())
    assert result.delta is not None
    file = result.delta / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1e-6
    save_file(tensors, file)
    with pytest.raises(SystemExit) as ended:
        main(["tune", "replay", str(result.journal)])
    assert ended.value.code == 1
    assert "the weights differ from those of the search" in " ".join(capsys.readouterr().out.split())


def test_rounding_is_small_beside_the_weights_too() -> None:
    assert is_rounding([(0.0, 0.5), (4e-6, 0.2)])
    assert not is_rounding([(0.0, 0.5), (4e-5, 0.2)]), "more than products of other shapes make"
    assert not is_rounding([(0.0, 0.5), (4e-6, 1e-5)]), "weights that have hardly moved"
    assert not is_rounding([]), "nothing to compare"
