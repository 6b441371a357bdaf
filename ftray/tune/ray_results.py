"""What Ray Tune is told of a search, for its loggers and other callbacks: one result for each finished segment."""

from collections.abc import Sequence
from typing import Any

from ftray.tune.engine import Segment
from ftray.tune.segment import Outcome


def results(segments: Sequence[Segment], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Tune results of a trial, in order of its segments.

    Each has the segment's `member`, `segment`, `steps` (tokens, if segments are counted in them), `hyperparameters`
    by their recipe paths, `score`, all other metrics under their names, and what it took (`seconds`, `cpu_s`,
    `tokens`). One without a score has `error`.
    """
    found = []
    for segment, outcome in zip(segments, outcomes, strict=True):
        told: dict[str, Any] = {
            **(outcome.metrics or {}),
            "member": segment.member,
            "segment": segment.segment,
            "steps": segment.stop_at,
            "hyperparameters": segment.config,
            "seconds": outcome.seconds,
            "cpu_s": outcome.cpu_s,
            "tokens": outcome.tokens,
        }
        found.append(
            told | ({"score": outcome.score} if outcome.score is not None else {"error": outcome.error})
        )
    return found
