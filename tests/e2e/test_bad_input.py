"""A user's mistakes at the command line: one line that names what is wrong, exit code 2, no traceback."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray.cli.main import main
from ftray.config.load import to_yaml
from ftray.testing import tiny
from ftray.train.io import LocalIO
from ftray.train.worker import train
from tests.recipes import MakeRecipe

Verb = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Verb:
    """Runs a verb that must fail as a user's mistake does; returns its one line."""

    def run(*words: Any) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in words])
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
        return lines[-1].removeprefix("error: ")

    return run


def works(*words: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 0


@pytest.fixture
def recipe_file(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(make_recipe()))
    return file


def edit(file: Path, path: str, value: Any) -> Path:
    tree = yaml.safe_load(file.read_text())
    node = tree
    *parents, leaf = path.split(".")
    for key in parents:
        node = node[key]
    node[leaf] = value
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.max_stesp", 3, "train.max_stesp: unknown key; did you mean `max_steps`?"),
        ("train.max_steps", "many", "train.max_steps: 'many' is refused; input should be a valid integer"),
        ("optim.type", "adamm", "'adamm' is not a optim; did you mean `adamw`?"),
        ("adapt.r", 0, "r: 0 is refused; input should be greater than or equal to 1"),
        (
            "adapt.target_modules",
            ["q_porj"],
            "adapt.target_modules: 'q_porj' matches no linear layer; near: q_proj",
        ),
        ("data.train", ["nowhere.jsonl"], "nowhere.jsonl: no such file; check the path"),
        (
            "model.model_name_or_path",
            "./nowhere",
            "'./nowhere' is not a folder; check the path of the base model",
        ),
        ("name", "Not A Name", "name: 'Not A Name' is refused; use lower-case letters"),
    ],
)
def test_recipe(fails: Verb, recipe_file: Path, path: str, value: Any, message: str) -> None:
    assert message in fails("run", edit(recipe_file, path, value))


def test_recipe_file(fails: Verb, tmp_path: Path) -> None:
    assert "nope.yaml: no such file" in fails("run", "nope.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2\nb: 3\n")
    assert "broken.yaml: line" in fails("run", broken)
    broken.write_text("- 1\n")
    assert "holds no settings" in fails("run", broken)


def test_override_without_value(fails: Verb, recipe_file: Path) -> None:
    assert "'seed': not an override; write it as `section.field=value`" in fails("run", recipe_file, "seed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there are no rows"),
        (b"\n\n", "there are no rows"),
        (b'{"prompt": "a"}\n', "1 of 1 rows cannot be used"),
        (b'{"prompt": "a", "completion": ""}\n', "1 of 1 rows cannot be used"),
        (b'{"text": "\xff\xfe"}\n', "1 of 1 rows cannot be used"),
        (b"{not json\n" * 3, "3 of 3 rows cannot be used"),
    ],
)
def test_rows(fails: Verb, recipe_file: Path, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    assert message in fails("run", edit(recipe_file, "data.train", str(file)))


def test_a_bad_row_is_counted_and_the_run_goes_on(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "ask", "completion": " answer"}) + "\n"
    file.write_text(good * 3 + "{broken\n" + good * 3)
    edit(recipe_file, "data.train", str(file))
    works("run", recipe_file, "data.max_quarantine=0.5", "train.max_steps=1")
    shown = capsys.readouterr()
    assert "1 quarantined" in shown.out + shown.err
    (quarantine,) = (tmp_path / "cache").glob("train-*/quarantine.jsonl")
    record = json.loads(quarantine.read_text())
    assert record["file"] == str(file) and record["line"] == 4 and record["offset"] == 3 * len(good)


def test_folders_that_are_no_model(fails: Verb, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = fails("run", edit(recipe_file, "model.model_name_or_path", str(tmp_path / "empty")))
    assert "not a model folder, config.json is missing" in line


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "no causal language model can be built from this"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "llama", "hidden_size": "abc"}, "hidden_size"),
        ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}, "heads"),
    ],
)
@pytest.mark.parametrize("init", ["pretrained", "config"])
def test_configurations_that_make_no_model(
    fails: Verb,
    recipe_file: Path,
    tiny_base: Path,
    tmp_path: Path,
    config: dict[str, Any],
    message: str,
    init: str,
) -> None:
    if init == "config":
        edit(
            recipe_file,
            "model",
            {"init": "config", "config": config, "tokenizer_name_or_path": str(tiny_base)},
        )
    else:
        shutil.copytree(tiny_base, tmp_path / "base")
        (tmp_path / "base/config.json").write_text(json.dumps(config))
        edit(recipe_file, "model.model_name_or_path", str(tmp_path / "base"))
    assert message in fails("run", recipe_file)


def test_half_fetched_model(fails: Verb, recipe_file: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    line = fails("run", edit(recipe_file, "model.model_name_or_path", str(base)))
    assert "model-00002-of-00002.safetensors: missing, though the index names it" in line


def test_rows_longer_than_the_model(fails: Verb, recipe_file: Path) -> None:
    assert "4096 is more than the model's 512 positions" in fails("run", recipe_file, "data.max_length=4096")


def test_check_names_the_bad_row(fails: Verb, recipe_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n{broken\n')
    line = fails("check", edit(recipe_file, "data.train", str(file)))
    assert line.startswith(f"{file}: 1 rows cannot be used; the first at line 2 (byte 17)")


def test_own_code_beside_the_recipe(recipe_file: Path, tmp_path: Path) -> None:
    """The installed command finds a module in the folder the user stands in."""
    (tmp_path / "mine.py").write_text(
        "from ftray.core.spec import spec\nfrom ftray.objective.lm import SupervisedFineTuning\n\n"
        "@spec\nclass Mine(SupervisedFineTuning):\n    pass\n"
    )
    edit(recipe_file, "objective", "mine:Mine")
    ftray = Path(sys.executable).with_name("ftray")
    done = subprocess.run(
        [ftray, "run", recipe_file, "train.max_steps=1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_delta_of_another_base(fails: Verb, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("trained", train__max_steps=1)
    result = train(recipe, LocalIO(tmp_path / "run"))
    assert result.delta is not None
    other = tiny.tiny_base(tmp_path / "other", seed=7)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": " b"}\n')
    tree = {"base": str(other), "rows": str(rows), "deltas": [str(result.delta)]}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(tree))
    assert "belongs to base" in fails("eval", tmp_path / "eval.yaml")
    works("publish", result.delta, "mine", "--registry", tmp_path / "registry")
    serve = {"base": str(other), "registry": str(tmp_path / "registry"), "deltas": ["mine"]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(serve))
    assert "belongs to base" in fails("serve", tmp_path / "serve.yaml")


def test_registry(fails: Verb, tmp_path: Path) -> None:
    assert "not a delta" in fails("publish", tmp_path, "name", "--registry", tmp_path / "r")
    assert "nothing: nothing is published under this name" in fails(
        "show", "nothing@3", "--registry", tmp_path / "r"
    )


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "ftray.cli.main", "run", "nope.yaml"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert plain.returncode == 2 and plain.stderr.count("\n") == 1
    assert "Traceback" in debug.stderr and "ConfigError" in debug.stderr
