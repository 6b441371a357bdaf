"""The work on one unit of a source file: lines -> rows -> transforms -> tokens -> packed rows.

A pure function of the unit and the plan, run in a loop here or in Ray tasks by `ray_prepare.py`; `units.py` keeps
what comes out.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftray.data.overlong import Overlong, fit
from ftray.data.pack import Packed, pack
from ftray.data.rows import BadRow, Row, rows_in, to_table
from ftray.data.source import Records, Unit, parse_record
from ftray.data.store import Store
from ftray.data.tokenise import Tokenised, tokenise, tokeniser
from ftray.data.transform.base import Barrier, Mask, RowTransform, apply_transforms


@dataclass(frozen=True)
class Plan:
    """What is done to every unit."""

    transforms: Sequence[RowTransform | Barrier]
    """Prepare-time steps on rows."""
    tokenizer_folder: str
    """Where the tokenizer is."""
    max_length: int
    """Tokens in one packed row."""
    packing: bool
    """Several documents in one row."""
    overlong: Overlong
    """What happens to documents longer than a row."""
    store: Store
    """Where shards are written."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Fields of a shape and the columns that hold them."""


@dataclass(frozen=True)
class Task:
    """One unit with the barriers' decisions about its rows."""

    unit: Unit
    """The byte range."""
    masks: tuple[Mask, ...] = ()
    """One for each barrier decided so far."""
    final: bool = True
    """False: run up to the next barrier and return its keys."""
    key: str = ""
    """Name under which the result is kept."""


@dataclass
class Outcome:
    """What came out of one unit."""

    unit: Unit
    """The byte range."""
    lines: int
    """Lines that begin in it, blank ones counted."""
    rows: int = 0
    """Rows read (lines that are not blank)."""
    documents: int = 0
    """Rows that became documents."""
    pairs: int = 0
    """Those of them that are preference rows, of two documents each."""
    split: int = 0
    """Rows cut into pieces because they are longer than a row of training."""
    truncated: int = 0
    """Rows cut at the left for the same reason."""
    changed: Counter[str] = field(default_factory=Counter)
    """What transforms changed, by rule."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Rows filtered out, by rule."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """One record for each row that could not be used: file, offset, line (in the unit), reason."""
    shard: dict[str, Any] | None = None
    """The shard's manifest entry; None if no row is left."""
    packed: Packed | None = None
    """The rows themselves, until they are written."""
    keys: list[bytes] | None = None
    """What a barrier compares, if the task was not final."""


Runner = Callable[[Callable[[Task], Outcome], Sequence[Task]], Iterable[Outcome]]
"""Applies a function to tasks, here or elsewhere; outcomes come in any order."""


def run_here(work: Callable[[Task], Outcome], tasks: Sequence[Task]) -> Iterator[Outcome]:
    """The `Runner` of this process."""
    return map(work, tasks)


def work_on(plan: Plan, task: Task) -> Outcome:
    """Prepare one unit. Raises `DataError` for what no row can be blamed for (a file, the tokenizer)."""
    unit = task.unit
    records = Records(unit, plan.columns)
    outcome = Outcome(unit, 0)
    parsed = []
    for record in records:
        outcome.rows += 1
        try:
            parsed.append((record.offset, record.number, parse_record(unit, record, plan.columns)))
        except BadRow as error:
            _quarantine(outcome, record.offset, record.number, str(error))
    outcome.lines = records.lines
    result = apply_transforms(to_table(parsed), plan.transforms, task.masks)
    outcome.filtered, outcome.changed = result.filtered, result.changed
    if not task.final:
        outcome.keys = result.keys
        return outcome
    assert result.keys is None
    found = tokenise(result.rows, tokeniser(plan.tokenizer_folder))
    offsets, numbers = result.rows["offset"].to_pylist(), result.rows["line"].to_pylist()
    for index, reason in found.bad:
        _quarantine(outcome, offsets[index], numbers[index], reason)
    _finish(plan, outcome, found)
    return outcome


def rows_of(plan: Plan, unit: Unit, masks: tuple[Mask, ...]) -> Iterator[Row]:
    """The usable rows of a unit after the transforms, all barriers decided."""
    parsed = []
    for record in Records(unit, plan.columns):
        with contextlib.suppress(BadRow):
            parsed.append((record.offset, record.number, parse_record(unit, record, plan.columns)))
    yield from rows_in(apply_transforms(to_table(parsed), plan.transforms, masks).rows)


def _finish(plan: Plan, outcome: Outcome, found: Tokenised) -> None:
    """Cut and pack the documents of a unit."""
    fitted = fit(found, plan.max_length, plan.overlong)
    outcome.documents, outcome.split, outcome.truncated = fitted.rows, fitted.split, fitted.truncated
    outcome.filtered.update(fitted.filtered)
    if not np.any(fitted.pieces.lens):
        return
    if fitted.groups is not None:
        outcome.pairs = int((fitted.groups == 2).sum())
    outcome.packed = pack(
        found.documents, fitted.pieces, plan.max_length, packing=plan.packing, groups=fitted.groups
    )


def _quarantine(outcome: Outcome, offset: int, line: int, reason: str) -> None:
    outcome.quarantined.append({"file": outcome.unit.file, "offset": offset, "line": line, "reason": reason})
