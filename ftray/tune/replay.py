"""`ftray tune replay`: train the schedule of one member again, alone, and compare the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ftray.core.errors import TuneError
from ftray.core.fs import digest_tree
from ftray.tune.engine import Segment
from ftray.tune.journal import read
from ftray.tune.members import schedule
from ftray.tune.population import replay
from ftray.tune.segment import Job, read_result, run_segment


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
    difference: float | None = None
    """Largest absolute difference of a weight. A member of a population was trained in larger products than it is
    alone, so that some rounding is left; None if the weights are gone or are no safetensors."""


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
    return Replayed(
        chosen.index,
        out,
        outcome.score,
        steps[-1]["score"],
        checkpoint,
        delta,
        _equal(delta, theirs),
        _difference(delta, theirs),
    )


def _equal(delta: Path | None, segment: Path) -> bool | None:
    theirs = _delta_of(segment)
    return None if delta is None or theirs is None else _weights(delta) == _weights(theirs)


def _difference(delta: Path | None, segment: Path) -> float | None:
    theirs = _delta_of(segment)
    if delta is None or theirs is None:
        return None
    from safetensors.torch import load_file

    differences = []
    for path in delta.rglob("*.safetensors"):
        other = theirs / path.relative_to(delta)
        if not other.is_file():
            return None
        ours, found = load_file(path), load_file(other)
        if ours.keys() != found.keys():
            return None
        differences += [float((ours[name] - found[name]).abs().max()) for name in ours]
    return max(differences, default=None)


def _delta_of(segment: Path) -> Path | None:
    delta = read_result(segment)[1] if (segment / "segment.json").is_file() else None
    return delta if delta is not None and delta.is_dir() else None


def _weights(delta: Path) -> dict[str, str]:
    """Digests of the files that hold weights; of all files where none does."""
    files = digest_tree(delta)
    return {name: value for name, value in files.items() if name.endswith(".safetensors")} or files
