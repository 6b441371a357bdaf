"""A campaign of kills counts only what it did, and always ends with its line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos_train
from benchmarks.chaos_outcome import Outcome, summary
from ftray.config.recipe import Recipe


class Dummy(chaos_train.Campaign):
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
    monkeypatch.setattr(chaos_train, "_FIND_S", 0.2)
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


def test_a_campaign_goes_on_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands make one record; a run that was cut off is begun anew."""
    monkeypatch.setattr(chaos_train, "Campaign", Dummy)

    def go_on() -> dict[str, Any]:
        found = chaos_train.campaign(tmp_path, 0, 0, ["worker", "driver"], quiet=True)
        json.dumps(found)
        return found

    assert [outcome["kind"] for outcome in go_on()["outcomes"]] == ["worker"]
    cut_off = tmp_path / "runs" / "001-driver" / "checkpoints"
    cut_off.mkdir(parents=True)
    found = go_on()
    assert [outcome["kind"] for outcome in found["outcomes"]] == ["worker", "driver"]
    assert not cut_off.exists()
    assert found["runs"] == 2


def test_what_ends_a_campaign_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any) -> None:
        raise RuntimeError("the reference run failed")

    monkeypatch.setattr(chaos_train.Campaign, "reference", fails)
    found = chaos_train.campaign(tmp_path, 1.0, 0, ["worker"], quiet=True)
    assert found["error"] == "RuntimeError: the reference run failed" and found["runs"] == 0
