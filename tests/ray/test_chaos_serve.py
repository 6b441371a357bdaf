"""Slices of the campaign against a real endpoint: kills, crowds, and a soak."""

from pathlib import Path

import pytest

from benchmarks.chaos_serve.slices import run_slice

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_kills_break_no_promise(tmp_path: Path) -> None:
    found = run_slice(tmp_path / "kills", "kills", seed=1, minutes=1.5)
    assert not found.broken, found
    assert found.counts["answered"] > 50 and found.events["kill_engine"] >= 1
    assert found.counts["streams_ended_with_error"] or found.events["kill_engine"] < 3


def test_crowds_break_no_promise(tmp_path: Path) -> None:
    found = run_slice(tmp_path / "crowds", "crowds", seed=1, minutes=0)
    assert not found.broken, found
    assert found.counts["refused"] > 50 and found.counts["left_early"] > 300


def test_a_soak_leaves_nothing_behind(tmp_path: Path) -> None:
    found = run_slice(tmp_path / "soak", "soak", seed=1, minutes=5)
    assert not found.broken, found
    assert found.counts["answered"] > 500 and min(found.events.values()) >= 3
    assert {"engine_mib_per_minute", "http_fds", "control_threads", "store_objects"} <= set(
        found.figures["grown"]
    )
