"""A search in pictures, from its journal: scores, schedules, lineage tree, parallel coordinates (PNG)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ftray.tune.journal import Record
from ftray.tune.members import MemberView
from ftray.tune.population import replay


def plot(records: Sequence[Record], path: Path, metric: str) -> None:
    """Draw each member's scores and the schedule of every searched number; nothing without scores."""
    commits = _commits(records)
    if not commits:
        return
    numbers = _numbers(commits)
    rows = 1 + len(numbers)
    figure, axes = _figure(rows, (7, 2.4 * rows))
    scores, *schedules = axes
    _draw(scores, commits, metric, lambda record: record["score"])
    for axis, name in zip(schedules, numbers, strict=True):
        _draw(axis, commits, name, lambda record, name=name: record["config"][name])  # type: ignore[misc]
        if name.endswith("learning_rate"):
            axis.set_yscale("log")
    _mark_exploits(scores, records)
    scores.legend(fontsize=8)
    axes[-1].set_xlabel("segment")
    _save(figure, path)


def plot_lineage(records: Sequence[Record], path: Path, mode: str) -> None:
    """Draw the tree of checkpoints: a row for each member, a line from what each segment began with.

    A line that changes rows is an exploit; a cross is a failure; the winner's ancestors are thick.
    """
    commits = {record["checkpoint"]: record for record in _commits(records)}
    population = replay(records)
    best = population.best(mode)
    starts = {record["name"]: record["checkpoint"] for record in records if record["kind"] == "start"}
    ancestors, name = set(), best.checkpoint if best else None
    while name is not None:
        ancestors.add(name)
        name = starts[name]
    figure, (axis,) = _figure(1, (8, 1.2 + 0.45 * len(population.members)))
    for name, commit in commits.items():
        origin = commits.get(starts[name] or "")
        row = origin["member"] if origin else commit["member"]
        bold = name in ancestors
        axis.plot(
            [commit["segment"], commit["segment"] + 1],
            [row, commit["member"]],
            color="C3" if bold else ("C0" if row == commit["member"] else "C1"),
            linewidth=2.6 if bold else 1.2,
            zorder=3 if bold else 2,
        )
        axis.annotate(f"{commit['score']:.3g}", (commit["segment"] + 1, commit["member"]), fontsize=6)
    for record in records:
        if record["kind"] == "fail" and record["final"]:
            axis.plot(record["segment"] + 0.5, record["member"], "kx")
    axis.set(xlabel="segment", ylabel="member", yticks=range(len(population.members)))
    axis.invert_yaxis()
    _save(figure, path)


def plot_curves(views: Sequence[MemberView], path: Path) -> None:
    """Draw each member's losses from its first step to its last, along its lineage."""
    figure, (axis,) = _figure(1, (8, 4))
    for view in views:
        training = [(r["step"], r["loss"]) for r in view.curve if "loss" in r and not r.get("final")]
        scored = [(r["step"], r["eval_loss"]) for r in view.curve if "eval_loss" in r]
        color = f"C{view.index % 10}"
        axis.plot(*_columns(training), linewidth=0.8, alpha=0.5, color=color)
        axis.plot(*_columns(scored), marker="o", markersize=3, color=color, label=f"member {view.index}")
    axis.set(xlabel="step", ylabel="loss (line with dots: validation)")
    axis.legend(fontsize=7, ncols=2)
    _save(figure, path)


def plot_parallel(records: Sequence[Record], path: Path, metric: str, mode: str) -> None:
    """Draw each finished segment as a line over the searched values and its score: parallel coordinates."""
    commits = _commits(records)
    if not commits:
        return
    names = list(commits[0]["config"])
    columns = [[commit["config"][name] for commit in commits] for name in names]
    columns.append([commit["score"] for commit in commits])
    placed = [_placed(column) for column in columns]
    sign = 1 if mode == "min" else -1
    order = sorted(range(len(commits)), key=lambda i: sign * commits[i]["score"], reverse=True)
    figure, (axis,) = _figure(1, (2.2 * len(columns) + 1, 4))
    for rank, index in enumerate(order):
        shade = (rank + 1) / len(order)
        axis.plot(
            range(len(columns)),
            [column[index] for column in placed],
            color=(0.85 - 0.85 * shade, 0.85 - 0.5 * shade, 0.9 - 0.2 * shade),
        )
    for place, column in enumerate(columns):
        axis.axvline(place, color="0.7", linewidth=0.8, zorder=0)
        for value, height in sorted(set(zip(map(_label, column), placed[place], strict=True))):
            if height in (0.0, 1.0) or len(set(column)) < 6:
                axis.annotate(value, (place, height), fontsize=7)
    axis.set_xticks(range(len(columns)), [*names, metric], fontsize=8)
    axis.set_yticks([])
    _save(figure, path)


def _placed(column: Sequence[Any]) -> list[float]:
    """Heights in [0, 1]: numbers by value, by logarithm if they span a decade; others by place."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in column):
        kinds = sorted({_label(value) for value in column})
        return [kinds.index(_label(value)) / max(1, len(kinds) - 1) for value in column]
    values = [float(value) for value in column]
    if min(values) > 0 and max(values) / min(values) > 10:
        values = [math.log(value) for value in values]
    low, span = min(values), (max(values) - min(values)) or 1.0
    return [(value - low) / span for value in values]


def _label(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _commits(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "commit"]


def _numbers(commits: Sequence[Record]) -> list[str]:
    config = commits[0]["config"]
    return [name for name, value in config.items() if isinstance(value, int | float)]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _figure(rows: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def _save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw(axis: Axes, commits: Sequence[Record], label: str, value: Callable[[Record], float]) -> None:
    for member in sorted({record["member"] for record in commits}):
        mine = [record for record in commits if record["member"] == member]
        axis.plot(
            [r["segment"] + 1 for r in mine], [value(r) for r in mine], marker="o", label=f"member {member}"
        )
    axis.set_ylabel(label)


def _mark_exploits(axis: Axes, records: Sequence[Record]) -> None:
    """Arrows `donor→member` where a member took over a donor's checkpoint."""
    for record in records:
        for decision in record.get("decisions", []):
            place = record["segment"] + 1
            axis.axvline(place, color="0.8", linewidth=0.8, zorder=0)
            text = f"{decision['donor']}→{decision['member']}"
            axis.annotate(
                text, (place, decision["score"]), xytext=(4, 6), textcoords="offset points", fontsize=8
            )
