"""What became of disturbed runs, one by one and in counts."""

import collections
import os
import platform
from dataclasses import dataclass, field
from typing import Any

ORDERLY = ("sigterm_driver", "sigterm_worker")
"""Kinds that leave time to commit: no step may be done twice."""


@dataclass
class Outcome:
    """What became of one disturbed run."""

    kind: str
    at_step: int
    disturbed: bool = False
    """The signal was delivered; a run that nobody disturbed proves nothing and counts for nothing."""
    finished: bool = False
    attempts: int = 0
    missing: int = 0
    repeated: int = 0
    corrupt: int = 0
    lost_steps: int = 0
    losses_equal: bool = False
    wall_s: float = 0.0
    notes: list[str] = field(default_factory=list)


def summary(outcomes: list[Outcome], minutes: float, seed: int) -> dict[str, Any]:
    """The counts that are printed last.

    A run counts as finished only if it was disturbed and then succeeded: one that ended, or never came to its step,
    before anybody disturbed it proves nothing. Only kills that happened are counted.
    """
    disturbed = [outcome for outcome in outcomes if outcome.disturbed]
    return {
        "benchmark": "chaos-train",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "minutes": minutes,
        "seed": seed,
        "runs": len(outcomes),
        "runs_disturbed": len(disturbed),
        "runs_finished": sum(outcome.finished for outcome in disturbed),
        "kills": dict(collections.Counter(outcome.kind for outcome in disturbed)),
        "ids_missing": sum(outcome.missing for outcome in outcomes),
        "ids_repeated": sum(outcome.repeated for outcome in outcomes),
        "corrupt_loads": sum(outcome.corrupt for outcome in outcomes),
        "losses_bit_equal": sum(outcome.losses_equal for outcome in disturbed),
        "largest_lost_steps": max((outcome.lost_steps for outcome in disturbed), default=0),
        "largest_lost_steps_after_sigterm": max(
            (outcome.lost_steps for outcome in disturbed if outcome.kind in ORDERLY), default=0
        ),
        "outcomes": [vars(outcome) for outcome in outcomes],
    }
