"""The members of a search one by one: where each stands, what its weights were trained with, its curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.core.errors import TuneError
from ftray.train.track.jsonl import FILE as METRICS
from ftray.train.track.jsonl import read_records
from ftray.tune.journal import Record, read
from ftray.tune.population import Member, Population, replay

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class MemberView:
    """One member, as far as it has come."""

    index: int
    status: str
    """`training`, `waiting`, `done`, `stopped` or `failed`."""
    score: float | None
    segment: int
    """Segments finished."""
    config: dict[str, Any]
    """Recipe path -> value, at present."""
    lineage: list[int]
    """The members whose weights it carries, oldest first; it is itself the last."""
    schedule: list[dict[str, Any]]
    """What its weights were trained with, segment by segment: member, segment, checkpoint, config, score."""
    curve: list[Record]
    """Records of metrics from the first step to the last, joined along the lineage; each also names the `member`
    that trained the step and its `segment`."""


def members(folder: Path) -> list[MemberView]:
    """The members of a search, also of one that is under way.

    Args:
        folder: the search's folder.

    Raises:
        TuneError: if there is no journal, or it is damaged.
    """
    records = read(folder / JOURNAL)
    population = replay(records)
    if population.opened is None:
        raise TuneError(f"{folder / JOURNAL}: the search has not begun; run it first")
    num_segments = population.opened["num_segments"]
    return [
        MemberView(
            index=member.index,
            status=status(population, member, num_segments),
            score=member.score,
            segment=min(member.segment, num_segments),
            config=member.config,
            lineage=member.lineage,
            schedule=schedule(records, member.checkpoint),
            curve=_curve(folder, records, population, member),
        )
        for member in population.members
    ]


def schedule(records: Sequence[Record], checkpoint: str | None) -> list[dict[str, Any]]:
    """The segments behind a checkpoint, oldest first, following donors back to the beginning."""
    commits = {record["checkpoint"]: record for record in records if record["kind"] == "commit"}
    starts = {record["name"]: record for record in records if record["kind"] == "start"}
    steps: list[dict[str, Any]] = []
    name = checkpoint
    while name is not None:
        commit = commits[name]
        step = {key: commit[key] for key in ("member", "segment", "checkpoint", "config", "score")}
        steps.append({**step, "stop_at": starts[name]["stop_at"]})
        name = starts[name]["checkpoint"]
    return steps[::-1]


def status(population: Population, member: Member, num_segments: int) -> str:
    """What a member is doing, in one word."""
    if not member.alive:
        return "failed"
    if member.index in population.running:
        return "training"
    if member.segment >= num_segments:
        return "done"
    return "stopped" if member.stopped else "waiting"


def _curve(folder: Path, records: Sequence[Record], population: Population, member: Member) -> list[Record]:
    segments = [(step["checkpoint"], step) for step in schedule(records, member.checkpoint)]
    if running := population.running.get(member.index):
        segments.append((running["name"], running))
    return [
        {**record, "member": step["member"], "segment": step["segment"]}
        for name, step in segments
        for record in read_records(folder / "segments" / name / METRICS)
    ]
