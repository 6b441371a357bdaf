"""A campaign of kills counts only what it did, and always ends with its line."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos
from benchmarks.chaos_outcome import Outcome, summary
from ftray.config.recipe import Recipe


class Dummy(chaos.Campaign):
    """Runs that only wait for some seconds, and are said to have come to any step at once."""

    seconds = 0.0

    def reference(self) -> None:
        pass

    def start(self, recipe: Recipe, *flags: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({self.seconds})"])
        self.children.append(process)
        return process


class Waiting(Dummy):
    """The step is reached at once."""

    seconds = 1.5

    def wait_for(self, name: str, step: int, process: subprocess.Popen[bytes]) -> bool:
        return True


def test_only_disturbed_runs_count() -> None:
    outcomes = [
        Outcome("worker", 7, disturbed=True, finished=True),
        Outcome("worker", 7, disturbed=False, finished=True),
        Outcome("raylet", 7, disturbed=True, finished=False),
    ]
    found = summary(outcomes, 1.0, 0)
    assert (found["runs"], found["runs_disturbed"], found["runs_finished"]) == (3, 2, 1)
    assert found["kills"] == {"worker": 1, "raylet": 1}


def test_who_ended_before_was_not_disturbed(tmp_path: Path) -> None:
    found = Dummy(tmp_path, 0).disturbed(0, "worker")
    assert found.finished and not found.disturbed
    assert found.notes == ["attempt 1 was not disturbed"]


def test_a_process_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "_FIND_S", 0.2)
    found = Waiting(tmp_path, 0).disturbed(0, "raylet")
    assert not found.disturbed and found.finished


def test_an_error_is_an_outcome_and_its_process_is_ended(tmp_path: Path) -> None:
    campaign = Waiting(tmp_path, 0)
    campaign.seconds = 60.0
    started: list[Any] = campaign.children
    found = campaign.disturbed(0, "worker")  # there is no progress file to take a worker's number from
    assert not found.finished and "progress" in found.notes[0]
    assert not started
    campaign.seconds = 1.5
    killed = campaign.disturbed(1, "driver")
    assert killed.disturbed and killed.finished and killed.attempts == 2


def test_the_line_is_printed_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: Any) -> None:
        raise RuntimeError("the reference run failed")

    monkeypatch.setattr(chaos.Campaign, "reference", fails)
    arguments = argparse.Namespace(seed=0, minutes=1.0, kinds=["worker"], json=True, keep=tmp_path)
    with pytest.raises(SystemExit):
        chaos.train(tmp_path, arguments)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["error"] == "RuntimeError: the reference run failed" and line["runs"] == 0
