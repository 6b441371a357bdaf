"""The outcome of a search, from its journal: the winner, what was done, what it took and what was saved."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftray.config.tune import TuneConfig
from ftray.core.errors import TuneError
from ftray.core.fs import write_json
from ftray.tune.journal import Record
from ftray.tune.members import schedule
from ftray.tune.population import Member, replay
from ftray.tune.segment import read_result

RESULT = "tune_result.json"


@dataclass(frozen=True)
class Cost:
    """What a search took, and what all members would have taken to the end.

    The former counts finished segments and those that diverged; of an attempt that was lost, nobody knows what it
    took. The latter is what finished segments took, times the segments there would have been.
    """

    segments: int
    tokens: int
    cpu_s: float
    """CPU seconds of the training processes; of a worker group what the most workers claim, all its time."""
    seconds: float
    """Seconds of training, summed over segments that ran side by side."""
    gpu_s: float
    """GPU seconds: those of training, times `gpus_per_trial` or the most workers of a group that claim one."""
    segments_to_the_end: int
    tokens_to_the_end: int
    cpu_s_to_the_end: float
    saved: float
    """Fraction of the segments that was not trained because the policy stopped a member before it."""


@dataclass(frozen=True)
class TuneResult:
    """The outcome of a search."""

    name: str
    member: int
    """The winner."""
    metric: str
    mode: str
    score: float
    metrics: dict[str, float]
    """All metrics of the winner's last segment."""
    config: dict[str, Any]
    """What the winner's last segment was trained with, recipe path -> value."""
    schedule: list[dict[str, Any]]
    """What the winner's weights were trained with, segment by segment: member, config, score."""
    lineage: list[int]
    """The members whose weights it carries, oldest first."""
    checkpoint: Path | None
    delta: Path | None
    folder: Path
    journal: Path
    num_members: int
    num_segments: int
    """Segments trained, over all members."""
    num_exploits: int
    """Times a member took over another's checkpoint."""
    num_perturbations: int
    """Exploits whose configuration came out different from the donor's."""
    num_replaced: int
    """Exploits that took the place of a diverged or crashed member."""
    num_failures: int
    """Attempts at a segment that failed."""
    num_drivers: int
    """Drivers it took: 1 plus the resumptions."""
    seconds: float
    """Time of this driver."""
    cost: Cost


def summarise(config: TuneConfig, folder: Path, records: Sequence[Record], seconds: float) -> TuneResult:
    """Read the outcome of a finished search out of its journal.

    Raises:
        TuneError: if no member has a score.
    """
    population = replay(records)
    best = population.best(config.mode)
    if best is None or best.score is None or best.checkpoint is None:
        raise TuneError(f"{folder}: no member has a score yet; go on with --resume")
    # A decision since then has changed what the member will be, not what its weights are.
    reached = next(a for m in population.members for a in m.arrivals if a and a.checkpoint == best.checkpoint)
    commits = [record for record in records if record["kind"] == "commit"]
    decisions = [decision for record in records for decision in record.get("decisions", [])]
    checkpoint, delta = read_result(folder / "segments" / best.checkpoint)
    return TuneResult(
        name=config.name,
        member=reached.member,
        metric=config.metric,
        mode=config.mode,
        score=best.score,
        metrics=next(record["metrics"] for record in commits if record["checkpoint"] == best.checkpoint),
        config=reached.config,
        schedule=schedule(records, best.checkpoint),
        lineage=reached.lineage,
        checkpoint=checkpoint,
        delta=delta,
        folder=folder,
        journal=folder / "journal.jsonl",
        num_members=len(population.members),
        num_segments=len(commits),
        num_exploits=len(decisions),
        num_perturbations=sum(decision["perturbed"] for decision in decisions),
        num_replaced=sum(decision["replaced"] for decision in decisions),
        num_failures=sum(record["kind"] == "fail" for record in records),
        num_drivers=population.epoch,
        seconds=round(seconds, 3),
        cost=cost(records, population.members, config),
    )


def cost(records: Sequence[Record], members: Sequence[Member], config: TuneConfig) -> Cost:
    """Sum up what the records of a search say that it took; at least one segment is finished."""
    commits = [record for record in records if record["kind"] == "commit"]
    ended = [*commits, *(record for record in records if record["kind"] == "fail")]
    to_the_end = len(members) * config.num_segments
    times = to_the_end / len(commits)
    left_out = sum(config.num_segments - member.segment for member in members if member.stopped)
    return Cost(
        segments=len(commits),
        tokens=round(_sum(ended, "tokens")),
        cpu_s=round(_sum(ended, "cpu_s"), 1),
        seconds=round(_sum(ended, "seconds"), 1),
        # Journals of older versions do not say it.
        gpu_s=round(sum(r.get("gpu_s", r.get("seconds", 0) * config.gpus_per_trial) for r in ended), 1),
        segments_to_the_end=to_the_end,
        tokens_to_the_end=round(_sum(commits, "tokens") * times),
        cpu_s_to_the_end=round(_sum(commits, "cpu_s") * times, 1),
        saved=round(left_out / to_the_end, 4),
    )


def _sum(records: Sequence[Record], field: str) -> float:
    return float(sum(record.get(field, 0) for record in records))


def write_result(result: TuneResult, folder: Path) -> None:
    """Write `tune_result.json` into a folder."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()}
    write_json(folder / RESULT, plain)
