"""When a campaign against searches has failed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos
from benchmarks.chaos_search import ARMS, MEMBERS, SEGMENTS, TRIALS
from benchmarks.chaos_tune import Campaign, Outcome, state, summary
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.spec import parse
from ftray.tune.journal import Journal, Record
from ftray.tune.local import open_search
from ftray.tune.population import replay

KEPT: dict[str, Any] = {
    "arm": "trials",
    "kinds": ["driver"],
    "finished": True,
    "same_lineage": True,
    "repeatable_per_kill": 10,
}


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, 0),
        ({"repeated_steps": 10}, 0),
        ({"kinds": [], "finished": False, "same_lineage": False}, 0),
        ({"finished": False}, 1),
        ({"same_lineage": False}, 1),
        ({"journal_kept": False}, 1),
        ({"trials_lost": 1}, 1),
        ({"references_missing": 1}, 1),
        ({"repeated_steps": 11}, 1),
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
    monkeypatch.setattr(Campaign, "disturbed", lambda self, number: Outcome())
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
    campaign.members = {"trials": state(replay(records))}
    outcome = Outcome()
    campaign.judge(TRIALS, "search", outcome, [records])
    assert outcome.same_lineage and outcome.trials_lost == MEMBERS * SEGMENTS


def test_the_bound_is_of_the_kills_that_were_delivered() -> None:
    found = summary([Outcome(**KEPT), Outcome(**(KEPT | {"kinds": ["driver", "trial"]}))], 1.0, 0)
    assert found["repeatable_steps"] == 3 * 10 and found["kills_of"] == {"trials": 3, "populations": 0}


def test_the_searches_that_are_disturbed_are_searches(tmp_path: Path) -> None:
    for arm in ARMS:
        (tmp_path / arm.name).mkdir()
        recipe = parse(Recipe, arm.recipe(tmp_path, tmp_path / arm.name))
        where = {"name": "search", "recipe": "recipe.yaml", "output_dir": str(tmp_path / arm.name)}
        engine, _ = open_search(parse(TuneConfig, where | arm.settings), recipe)
        assert len(engine.population.members) == MEMBERS
        engine.close()
