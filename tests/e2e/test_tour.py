"""The quickstart itself: what it caches, and (long) the whole walk within its time."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ftray.cli.ask import curl_lines
from ftray.cli.tour import Tour
from ftray.core.fs import read_json, write_json
from ftray.registry.registry import Registry

EXAMPLES = Path(__file__).parents[2] / "examples/quickstart"


def test_a_base_counts_as_cached_only_while_all_of_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tour = Tour(EXAMPLES)
    parts = (tour.folder / "base/delta/ftray_delta.json", tour.folder / "corpus/pretrain.jsonl")
    stamp = tour.folder / "base.json"
    for part in parts:
        part.parent.mkdir(parents=True)
        part.touch()
    assert not tour._is_cached()
    write_json(stamp, {"key": "of another recipe"})
    assert not tour._is_cached()
    write_json(stamp, {"key": tour._key})
    assert tour._is_cached()
    parts[0].unlink()
    assert not tour._is_cached()


def test_curl_lines_are_one_shell_command_each() -> None:
    lines = curl_lines("http://127.0.0.1:1", {"raises": "k1", "describe": "k2"})
    for line, key in zip(lines[1:], ("k1", "k2"), strict=True):
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True
        )
        assert f"authorization: Bearer {key}" in words.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_walk_twice(tmp_path: Path) -> None:
    """From nothing in under 8 minutes, with the base cached in under 4, and nothing is left running."""
    (tmp_path / "examples").mkdir()
    shutil.copytree(EXAMPLES, tmp_path / "examples/quickstart")
    ftray = Path(sys.executable).with_name("ftray")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    before = {process.pid for process in psutil.process_iter()}
    for limit_s in (480, 240):
        start = time.monotonic()
        done = subprocess.run(
            [ftray, "quickstart"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        seconds = time.monotonic() - start
        assert done.returncode == 0, done.stderr[-2000:]
        assert seconds < limit_s, done.stdout[-3000:]
        assert len(re.findall("beats all", done.stdout + done.stderr)) >= 2
        left = [p for p in psutil.process_iter(["name"]) if p.pid not in before and "ray" in p.info["name"]]
        assert not left
    result = read_json(tmp_path / "runs/quickstart/search/tune_result.json")
    assert result["num_perturbations"] > 0
    for task in ("raises", "describe"):
        assert (tmp_path / f"runs/quickstart/{task}/loss.png").stat().st_size > 10_000
        published = Registry(tmp_path / "runs/quickstart/registry").show(f"{task}@2")
        assert published.delta.parity is not None and published.aliases == ("prod",)
