"""A short campaign of kills and publishes against a real endpoint."""

from pathlib import Path

import pytest

from benchmarks import chaos_serve

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.timeout(400)
def test_a_campaign_breaks_no_promise(tmp_path: Path) -> None:
    found = chaos_serve.campaign(tmp_path, minutes=1.0, seed=1, quiet=True)
    assert found["error"] is None
    assert found["promises_broken"] == 0, found
    assert found["answered"] > 50 and sum(found["events"].values()) >= 5
