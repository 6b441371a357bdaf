"""`ftray tune replay`: train the schedule of one member again, alone, and compare the weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftray.core.errors import TuneError
from ftray.core.fs import digest_tree
from ftray.core.spec import build_piece
from ftray.tune.engine import Segment
from ftray.tune.journal import read
from ftray.tune.members import schedule
from ftray.tune.population import replay
from ftray.tune.segment import Job, read_result, run_segment

ROUNDING = 1e-5
"""Largest difference of a float32 weight that the shapes of products explain."""
RELATIVE_ROUNDING = 1e-3
"""The same as a fraction of the largest weight of its tensor, for those that have hardly moved."""


@dataclass(frozen=True)
class Replayed:
    """What came of training a schedule again."""

    member: int
    folder: Path
    score: float
    recorded_score: float
    """The score the search found."""
    checkpoint: Path | None
    delta: Path | None
    equal: bool | None
    """Whether the weights are those of the search, bit for bit; None if these are gone."""
    rounded: bool = False
    """Whether they are but for rounding: a population's member was trained in larger products than it is alone."""
    difference: float | None = None
    """Largest absolute difference of a weight; None if the weights are gone or are no safetensors."""


def replay_schedule(
    journal: Path,
    folder: Path | None = None,
    member: int | None = None,
    on_segment: Callable[[int, int], None] = lambda done, total: None,
) -> Replayed:
    """Train the segments behind a member's checkpoint one after the other, in this process.

    Args:
        journal: the journal of a search.
        folder: where to train; None: `replay-<member>` beside the journal. What was trained there is found.
        member: whose schedule; None: the winner's.
        on_segment: called with the segments done and their number.

    Raises:
        TuneError: for a member that is not there or has no score, or a segment that fails.
    """
    records = read(journal)
    population = replay(records)
    search = population.opened
    best = population.best(search["mode"]) if search else None
    if search is None or best is None:
        raise TuneError(f"{journal}: no member has a score yet; go on with the search")
    if member is not None and member not in range(len(population.members)):
        raise TuneError(f"--member: {member} is none of {len(population.members)}, counted from 0")
    chosen = best if member is None else population.members[member]
    steps = schedule(records, chosen.checkpoint)
    if not steps or chosen.score is None:
        raise TuneError(f"--member: {chosen.index} has no score; choose another one")
    out = (folder or journal.parent / f"replay-{chosen.index}").absolute()
    job = Job(str(out), search["recipe"], search["train_fn"], search["metric"], str(Path.cwd()))
    before: str | None = None
    for number, step in enumerate(steps):
        on_segment(number, len(steps))
        name = f"s{number:03}-{step['checkpoint'].rpartition('-')[2]}"
        segment = Segment(name, chosen.index, number, 0, 0, before, step["config"], step["stop_at"])
        outcome = run_segment(job, segment)
        if outcome.score is None:
            raise TuneError(f"{out}: segment {number} failed: {outcome.error}")
        before = name
    on_segment(len(steps), len(steps))
    assert before is not None and outcome.score is not None
    checkpoint, delta = read_result(job.path(before))
    theirs = journal.parent / "segments" / steps[-1]["checkpoint"]
    differences = _differences(delta, _delta_of(theirs))
    together = build_piece("executor", search["executor"]).group_size(2) > 1
    return Replayed(
        chosen.index,
        out,
        outcome.score,
        steps[-1]["score"],
        checkpoint,
        delta,
        _equal(delta, theirs),
        together and is_rounding(differences),
        max((absolute for absolute, _ in differences), default=None),
    )


def _equal(delta: Path | None, segment: Path) -> bool | None:
    theirs = _delta_of(segment)
    return None if delta is None or theirs is None else _weights(delta) == _weights(theirs)


def is_rounding(differences: Sequence[tuple[float, float]]) -> bool:
    """True if products of other shapes may explain so much.

    Args:
        differences: of each tensor, largest absolute difference and largest magnitude. A tensor that began at zero,
            of which every low-rank adapter has one, is as large as it has moved.
    """
    return bool(differences) and all(
        absolute <= ROUNDING and absolute <= RELATIVE_ROUNDING * magnitude
        for absolute, magnitude in differences
    )


def _differences(ours: Path | None, theirs: Path | None) -> list[tuple[float, float]]:
    """Of each tensor, largest absolute difference and largest magnitude; empty if they cannot be compared."""
    if ours is None or theirs is None:
        return []
    from safetensors.torch import load_file

    found = []
    for path in ours.rglob("*.safetensors"):
        other = theirs / path.relative_to(ours)
        mine, its = load_file(path), load_file(other) if other.is_file() else {}
        if mine.keys() != its.keys() or any(mine[name].shape != its[name].shape for name in mine):
            return []
        found += [(float((mine[n] - its[n]).abs().max()), float(its[n].abs().max())) for n in mine]
    return found


def _delta_of(segment: Path) -> Path | None:
    delta = read_result(segment)[1] if (segment / "segment.json").is_file() else None
    return delta if delta is not None and delta.is_dir() else None


def _weights(delta: Path) -> dict[str, str]:
    """Digests of the files that hold weights; of all files where none does."""
    files = digest_tree(delta)
    return {name: value for name, value in files.items() if name.endswith(".safetensors")} or files
