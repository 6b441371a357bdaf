"""What a search did, from its journal: the winner, a table of the members, curves and schedules."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ftray.config.tune import TuneConfig
from ftray.core.errors import TuneError
from ftray.core.fs import write_json
from ftray.tune.journal import Record
from ftray.tune.population import Member, Population, replay
from ftray.tune.segment import read_result

RESULT = "tune_result.json"


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
    """The winner's last configuration, recipe path -> value."""
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


def summarise(config: TuneConfig, folder: Path, records: Sequence[Record], seconds: float) -> TuneResult:
    """Read the outcome of a finished search out of its journal.

    Raises:
        TuneError: if no member has a score.
    """
    population = replay(records)
    best = population.best(config.mode)
    if best is None or best.score is None or best.checkpoint is None:
        raise TuneError(f"{folder}: no member has a score yet; go on with --resume")
    commits = [record for record in records if record["kind"] == "commit"]
    decisions = [decision for record in records for decision in record.get("decisions", [])]
    checkpoint, delta = read_result(folder / "segments" / best.checkpoint)
    return TuneResult(
        name=config.name,
        member=best.index,
        metric=config.metric,
        mode=config.mode,
        score=best.score,
        metrics=next(record["metrics"] for record in commits if record["checkpoint"] == best.checkpoint),
        config=best.config,
        schedule=schedule(records, best.checkpoint),
        lineage=best.lineage,
        checkpoint=checkpoint,
        delta=delta,
        folder=folder,
        journal=folder / "journal.jsonl",
        num_members=config.num_members,
        num_segments=len(commits),
        num_exploits=len(decisions),
        num_perturbations=sum(decision["perturbed"] for decision in decisions),
        num_replaced=sum(decision["replaced"] for decision in decisions),
        num_failures=sum(record["kind"] == "fail" for record in records),
        num_drivers=population.epoch,
        seconds=round(seconds, 3),
    )


def schedule(records: Sequence[Record], checkpoint: str) -> list[dict[str, Any]]:
    """The segments behind a checkpoint, oldest first, following donors back to the beginning."""
    commits = {record["checkpoint"]: record for record in records if record["kind"] == "commit"}
    starts = {record["name"]: record for record in records if record["kind"] == "start"}
    steps: list[dict[str, Any]] = []
    name: str | None = checkpoint
    while name is not None:
        commit = commits[name]
        steps.append({key: commit[key] for key in ("member", "segment", "config", "score")})
        name = starts[name]["checkpoint"]
    return steps[::-1]


def write_report(result: TuneResult, records: Sequence[Record]) -> None:
    """Write `tune_result.json` and `tune.png` into the search's folder."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()}
    write_json(result.folder / RESULT, plain)
    plot(records, result.folder / "tune.png", result.metric)


def table(population: Population, mode: str, num_segments: int) -> Table:
    """The members as they stand: score, progress, configuration, lineage."""
    paths = list(population.members[0].config) if population.members else []
    view = Table(
        "member", "status", "segments", "score", *[path.rpartition(".")[2] for path in paths], "lineage"
    )
    best = population.best(mode)
    for member in population.members:
        view.add_row(
            str(member.index),
            _status(population, member, num_segments),
            f"{min(member.segment, num_segments)}/{num_segments}",
            "" if member.score is None else f"{member.score:.4f}",
            *[_shown(member.config[path]) for path in paths],
            " > ".join(str(index) for index in member.lineage),
            style="bold" if member is best else None,
        )
    return view


def plot(records: Sequence[Record], path: Path, metric: str) -> None:
    """Draw each member's scores and the schedule of every searched number, as a PNG; nothing without scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    commits = [record for record in records if record["kind"] == "commit"]
    if not commits:
        return
    numbers = [name for name, value in commits[0]["config"].items() if isinstance(value, int | float)]
    rows = 1 + len(numbers)
    figure, grid = plt.subplots(rows, 1, figsize=(7, 2.4 * rows), sharex=True, squeeze=False)
    scores, *schedules = grid[:, 0]
    _draw(scores, commits, metric, lambda record: record["score"])
    for axis, name in zip(schedules, numbers, strict=True):
        _draw(axis, commits, name, lambda record, name=name: record["config"][name])  # type: ignore[misc]
        if name.endswith("learning_rate"):
            axis.set_yscale("log")
    _mark_exploits(scores, records)
    scores.legend(fontsize=8)
    grid[-1, 0].set_xlabel("segment")
    grid[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axis: Any, commits: Sequence[Record], label: str, value: Callable[[Record], float]) -> None:
    for member in sorted({record["member"] for record in commits}):
        mine = [record for record in commits if record["member"] == member]
        axis.plot(
            [r["segment"] + 1 for r in mine], [value(r) for r in mine], marker="o", label=f"member {member}"
        )
    axis.set_ylabel(label)


def _mark_exploits(axis: Any, records: Sequence[Record]) -> None:
    """Arrows `donor→member` where a member took over a donor's checkpoint."""
    for record in records:
        for decision in record.get("decisions", []):
            place = record["segment"] + 1
            axis.axvline(place, color="0.8", linewidth=0.8, zorder=0)
            text = f"{decision['donor']}→{decision['member']}"
            axis.annotate(
                text, (place, decision["score"]), xytext=(4, 6), textcoords="offset points", fontsize=8
            )


def _status(population: Population, member: Member, num_segments: int) -> str:
    if not member.alive:
        return "failed"
    if member.index in population.running:
        return "training"
    return "done" if member.segment >= num_segments else "waiting"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
