"""`ftray data`: the verbs print what is in a corpus, in this process."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ftray.cli import screen
from ftray.cli.data import app
from ftray.core.errors import ConfigError, DataError


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(30)
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "{broken"]))
    (tmp_path / "validation.jsonl").write_text(lines[0])
    data = {
        "train": str(tmp_path / "rows.jsonl"),
        "validation": str(tmp_path / "validation.jsonl"),
        "max_length": 64,
        "max_quarantine": 0.05,
        "cache_dir": str(tmp_path / "cache"),
    }
    pieces = {"adapt": "lora", "objective": "sft", "optim": "adamw", "lr_scheduler": "linear"}
    content: dict[str, Any] = {"name": "r", "model": {"model_name_or_path": str(tiny_base)}, "data": data}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, **pieces, "strategy": "single", "train": {"max_steps": 1}}))
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal wide enough for any path: a console takes its width once, when it is made."""
    monkeypatch.setattr(screen.out, "width", 300)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception:
        raise result.exception
    return result.output


def test_prepare_and_stats(recipe: Path) -> None:
    shown = run("prepare", str(recipe), "--local")
    assert "quarantined: not JSON: Expecting property name" in shown
    assert shown.count("rows filled") == 2
    [folder] = (recipe.parent / "cache").glob("train-*")
    assert str(folder) in shown
    stats = run("stats", str(folder))
    assert "tokens per document: shortest 25, median 26" in stats and "repeated documents: 0" in stats
    source = next(
        line for line in stats.splitlines() if line.split()[:1] == [str(recipe.parent / "rows.jsonl")]
    )
    assert source.split()[1:3] == ["31", "30"] and source.split()[-1] == "1"
    assert (folder / "lengths.png").stat().st_size > 5000
    assert "quarantined rows: " in stats


def test_inspect(recipe: Path) -> None:
    shown = run("inspect", str(recipe.parent / "rows.jsonl"))
    assert "messages 30" in shown
    assert "(first at line 31): 1x not JSON" in shown


def test_inspect_of_other_formats_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nq,a\nq,a,more\n")
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "q", "output": "a"}, {"chosen": "a"}]))
    (tmp_path / "prose.txt").write_text("One.\n\nTwo.\n")
    shown = run(
        "inspect", str(tmp_path / "a.csv"), "--column", "prompt=question", "--column", "completion=answer"
    )
    assert "prompt_completion 1" in shown
    assert "(first at row 2): 1x more cells than the header has columns" in shown
    assert "alpaca 1" in run("inspect", str(tmp_path / "b.json"))
    assert "text 2" in run("inspect", str(tmp_path / "prose.txt"), "--sample-by", "paragraph")
    with pytest.raises(ConfigError, match="sample_by"):
        run("inspect", str(tmp_path / "prose.txt"), "--sample-by", "word")


def test_show(recipe: Path) -> None:
    shown = run("show", str(recipe), "data.packing=false", "--rows", "1")
    assert "# Answer:⟦ yes<|end|>⟧" in shown
    assert " tokens, 5 targets" in shown


def test_show_applies_what_is_applied_when_rows_are_read(recipe: Path) -> None:
    changes = ["data.packing=false", "data.transforms=[prompt_weight]"]
    shown = run("show", str(recipe), *changes, "--rows", "1")
    assert "⟦" in shown.splitlines()[1], "the prompt is learnt too"
    assert " tokens, 5 targets" not in shown
    assert " tokens, 5 targets" in run("show", str(recipe), *changes, "--validation", "--rows", "1")


def test_export_and_gc(recipe: Path) -> None:
    """Held-out rows are written out; then what no run needs is listed, and removed when asked to."""
    out, split = recipe.parent / "test.jsonl", "data.transforms=[{type: split, test: 0.3}]"
    shown = run("export", str(recipe), str(out), split)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert f"{len(rows)} rows: {out}" in shown and 2 < len(rows) < 20
    assert all(row["messages"][1] == {"role": "assistant", "content": "yes"} for row in rows)
    with pytest.raises(ConfigError, match="--split: 'rest' is no part; known: train, validation, test"):
        run("export", str(recipe), str(out), split, "--split", "rest")
    run("prepare", str(recipe), "--local")
    cache = recipe.parent / "cache"
    assert "0 data sets and 0 files of shards" in run("gc", str(cache)) and list(cache.glob("train-*"))
    time.sleep(0.01)
    listed = run("gc", str(cache), "--days", "0")
    assert "not needed: 2 data sets and " in listed and "`--remove` removes it" in listed
    assert all(str(folder) in listed for folder in cache.glob("*-*/"))
    assert "removed: 2 data sets" in run("gc", str(cache), "--days", "0", "--remove")
    assert not list(cache.glob("*-*/")) and not list(cache.glob("shards/*"))
    with pytest.raises(DataError, match="no such folder"):
        run("gc", str(recipe.parent / "nothing"))


def test_tokenizer(recipe: Path) -> None:
    folder = recipe.parent / "tokenizer"
    arguments = ["tokenizer", str(recipe.parent / "rows.jsonl"), "--out", str(folder), "--vocab-size", "270"]
    assert str(folder) in run(*arguments)
    assert (folder / "tokenizer.json").is_file()
    with pytest.raises(DataError, match="is there already"):
        run(*arguments)


def test_pairs_are_shown_and_counted(recipe: Path) -> None:
    pairs = [{"prompt": f"{i}:", "chosen": "yes" * (1 + i % 2), "rejected": "no"} for i in range(10)]
    rows = recipe.parent / "pairs.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in pairs))
    changes = [f"data.train={rows}", f"data.validation={rows}", "data.packing=false"]
    shown = run("show", str(recipe), *changes, "--rows", "2")
    assert "chosen: 6 tokens, 4 targets" in shown and "rejected: 5 tokens, 3 targets" in shown
    prepared = run("prepare", str(recipe), *changes, "--local")
    assert prepared.split()[prepared.split().index("pairs") + 1] == "10"
    folders = sorted((recipe.parent / "cache").glob("train-*"))
    stats = [run("stats", str(folder)) for folder in folders]
    assert any("target tokens of chosen: median 5, 90 % 7" in text for text in stats)
    assert any("target tokens of rejected: median 3, 90 % 3" in text for text in stats)
