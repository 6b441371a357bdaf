"""When a campaign against searches has failed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos
from benchmarks.chaos_tune import MEMBERS, SEGMENTS, STEPS, Campaign, Outcome, state, summary
from ftray.tune.journal import Journal, Record
from ftray.tune.population import replay

KEPT: dict[str, Any] = {"kinds": ["driver"], "finished": True, "same_lineage": True}


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, 0),
        ({"repeated_steps": 2 * STEPS}, 0),
        ({"kinds": [], "finished": False, "same_lineage": False}, 0),
        ({"finished": False}, 1),
        ({"same_lineage": False}, 1),
        ({"journal_kept": False}, 1),
        ({"trials_lost": 1}, 1),
        ({"references_missing": 1}, 1),
        ({"repeated_steps": 2 * STEPS + 1}, 1),
    ],
)
def test_a_promise_that_is_broken_fails_the_command(
    changes: dict[str, Any],
    broken: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "outcomes.jsonl").write_text(json.dumps(KEPT | changes) + "\n")
    monkeypatch.setattr(chaos.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(Campaign, "reference", lambda self: None)
    monkeypatch.setattr(Campaign, "disturbed", lambda self, number, kind: Outcome())
    monkeypatch.setattr(sys, "argv", ["chaos", "--tune", "--json", "--minutes", "0", "--keep", str(tmp_path)])
    code: Any = 0
    try:
        chaos.main()
    except SystemExit as ended:
        code = ended.code
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["promises_broken"], code) == (broken, broken)


def test_an_attempt_that_failed_is_no_segment_that_ended(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, 0)
    (tmp_path / "search" / "search").mkdir(parents=True)
    records: list[Record] = [
        {"kind": "open", "search": {}, "configs": [{}] * MEMBERS},
        {"kind": "start", "member": 0, "segment": 0, "name": "m000-s000-abc", "checkpoint": None},
        {"kind": "fail", "member": 0, "segment": 0, "final": False},
    ]
    journal = Journal(tmp_path / "search" / "search" / "journal.jsonl")
    for record in records:
        journal.append(record)
    journal.close()
    campaign.members = state(replay(records))
    outcome = Outcome()
    campaign.judge("search", outcome, [records])
    assert outcome.same_lineage and outcome.trials_lost == MEMBERS * SEGMENTS


def test_the_bound_is_of_the_kills_that_were_delivered() -> None:
    found = summary([Outcome(**KEPT), Outcome(**(KEPT | {"kinds": ["driver", "trial"]}))], 1.0, 0)
    assert found["repeatable_steps"] == 2 * 2 * STEPS
