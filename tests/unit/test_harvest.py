"""The quickstart's corpus: held-out code is nowhere in what is trained on, answers are right and balanced."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "harvest.py"
PACKAGES = ("asyncio", "email", "json", "logging", "http", "multiprocessing", "urllib", "importlib")
Files = dict[str, list[dict]]  # type: ignore[type-arg]


@pytest.fixture(scope="module")
def harvest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harvest", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["harvest"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(harvest: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the standard library, with copies of functions under other names."""
    root = tmp_path_factory.mktemp("library")
    for package in PACKAGES:
        shutil.copytree(harvest.STANDARD_LIBRARY / package, root / package)
    source = (root / "json" / "encoder.py").read_text("utf-8")
    (root / "copied.py").write_text(source.replace("def ", "def other_").replace("'", '"'), "utf-8")
    return root


@pytest.fixture(scope="module")
def files(harvest: ModuleType, library: Path) -> Files:
    return dict(harvest.harvest(library))


def flat(text: str) -> str:
    return " ".join(text.split()).lower()


def body_of(question: str) -> str:
    [function] = ast.parse(question).body
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    return flat("\n".join(text for text in map(ast.unparse, function.body) if text != "..."))


def question(row: dict) -> str:  # type: ignore[type-arg]
    return str(row["messages"][0]["content"])


def test_no_held_out_code_is_trained_on(files: Files, harvest: ModuleType) -> None:
    pretrain = [flat(row["text"]) for row in files["pretrain.jsonl"]]
    train = [flat(question(row)) for task in harvest.TASKS for row in files[f"{task}/train.jsonl"]]
    text = "\n".join(pretrain + train)
    checked = 0
    for task in harvest.TASKS:
        for split in ("validation", "test"):
            for row in files[f"{task}/{split}.jsonl"]:
                body = body_of(question(row))
                if len(harvest.skeleton(body)) >= harvest.DISTINCT_CHARS:
                    assert body not in text, question(row)
                    checked += 1
    assert checked > 200


def test_the_check_would_find_a_leak(files: Files) -> None:
    """The training rows' own bodies are found in the pre-training text, most of them."""
    text = "\n".join(flat(row["text"]) for row in files["pretrain.jsonl"])
    rows = files["describe/train.jsonl"][:100]
    assert sum(body_of(question(row)) in text for row in rows) > 80


def test_no_question_is_in_two_splits(files: Files, harvest: ModuleType) -> None:
    for task in harvest.TASKS:
        rows = [
            flat(body_of(question(row))) for s in ("validation", "test") for row in files[f"{task}/{s}.jsonl"]
        ]
        train = {body_of(question(row)) for row in files[f"{task}/train.jsonl"]}
        assert not train & {row for row in rows if len(harvest.skeleton(row)) >= harvest.DISTINCT_CHARS}


def test_copies_fall_on_one_side(harvest: ModuleType) -> None:
    def function(source: str) -> object:
        return harvest.Function(ast.parse(source).body[0], False)

    one = function("def f(a):\n    '''Doc.'''\n    b = a.get('key', 1)\n    return b.value + a.other")
    two = function('def g(a):\n    b = a.get("k2", 23)\n\n    return (b.value + a.other)')
    assert one.content == two.content and one.split == two.split  # type: ignore[attr-defined]


def test_answers(harvest: ModuleType) -> None:
    def ask(task: str, source: str) -> list[str]:
        module = ast.parse(source)
        return [e.answer for f in harvest.functions_of(module) for e in harvest.TASKS[task][1](f)]

    pair = "def f(a):\n    if a > 3:\n        raise ValueError('no')\n    raise errors.KeyError(a)"
    assert ask("raises", pair) == ["ValueError", "KeyError"]
    assert ask("raises", "def f(a):\n    def g():\n        raise OSError\n    return g") == ["none"]
    assert ask("raises", "def f(a):\n    try:\n        g()\n    except E:\n        raise") == []
    long = "first_value = self.method_name(first, second)"
    method = f"class C:\n    def f(self, a, *, b=1, **c):\n        {long}"
    assert ask("describe", method) == ["A method with several parameters. It returns nothing."]
    assert ask("describe", f"def f():\n    {long}\n    yield 1") == [
        "A function with no parameters. It yields values."
    ]
    inner = f"def f(a):\n    {long}\n    def g():\n        return 1\n    return None"
    assert ask("describe", inner) == ["A function with one parameter. It returns nothing."]


def test_rows_are_short_and_balanced(files: Files, harvest: ModuleType) -> None:
    for task, (marker, _) in harvest.TASKS.items():
        for split in ("train", "validation", "test"):
            rows = files[f"{task}/{split}.jsonl"]
            assert all(question(row).endswith(f"\n{marker}") for row in rows)
            assert all(len(question(row)) <= harvest.MAX_CODE_CHARS + len(marker) + 1 for row in rows)
            assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
        answers = Counter(row["messages"][1]["content"] for row in files[f"{task}/test.jsonl"])
        assert answers.most_common(1)[0][1] / answers.total() < 0.45
    assert len(files["describe/test.jsonl"]) >= 100


def test_the_script_writes_the_same_files_again(library: Path, files: Files, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--root", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "raises/test.jsonl" in done.stdout
    for name, rows in files.items():
        lines = (tmp_path / name).read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
