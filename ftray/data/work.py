"""The work on one unit of a source file: lines -> rows -> transforms -> tokens -> packed rows.

A pure function of the unit and the plan, run in a loop here or in Ray tasks by `ray_prepare.py`; `units.py` keeps
what comes out. A unit goes through in blocks of rows and each block is a shard of its own, so a unit that cannot be
made small (a compressed file, a row group) takes no more memory than a small one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ftray.data.overlong import Overlong, fit
from ftray.data.pack import Packed, pack
from ftray.data.rows import BadRow, Row, rows_in, to_table
from ftray.data.source import Records, Unit, parse_record
from ftray.data.store import Store
from ftray.data.tokenise import tokenise, tokeniser
from ftray.data.transform.base import Barrier, Decision, Mask, RowTransform, apply_transforms

BLOCK_CHARS = 4 << 20
"""Text of the rows that are worked on at once: as much as a unit of JSON lines has, which is one block."""
_ROW_CHARS = 12
"""What JSON needs around the text of a row at least; without it, short rows would be too many."""


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
    block_chars: int = BLOCK_CHARS
    """Text of the rows that are worked on at once."""


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
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that could not be used, by reason."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """One record for each of them: file, offset, line (in the unit), reason."""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """The shards' manifest entries; none if no row is left."""
    keys: list[bytes] | None = None
    """What a barrier compares, if the task was not final."""


Runner = Callable[[Callable[[Task], Outcome], Sequence[Task]], Iterable[Outcome]]
"""Applies a function to tasks, here or elsewhere; outcomes come in any order."""


def run_here(work: Callable[[Task], Outcome], tasks: Sequence[Task]) -> Iterator[Outcome]:
    """The `Runner` of this process."""
    return map(work, tasks)


def work_on(plan: Plan, task: Task, keep: Callable[[Packed], dict[str, Any]]) -> Outcome:
    """Prepare one unit.

    Args:
        plan: what is done.
        task: the unit.
        keep: writes the packed rows of one block and gives their manifest entry.

    Raises:
        DataError: for what no row can be blamed for (a file, the tokenizer).
    """
    outcome = Outcome(task.unit, 0, keys=None if task.final else [])
    decisions = [Decision(mask) for mask in task.masks]
    for table in _blocks(plan, outcome):
        result = apply_transforms(table, plan.transforms, decisions)
        outcome.filtered += result.filtered
        outcome.changed += result.changed
        if outcome.keys is not None:
            assert result.keys is not None
            outcome.keys += result.keys
            continue
        assert result.keys is None
        packed = _packed(plan, outcome, result.rows)
        if packed is not None:
            outcome.shards.append(keep(packed))
    return outcome


def rows_of(plan: Plan, unit: Unit, masks: tuple[Mask, ...]) -> Iterator[Row]:
    """The usable rows of a unit after the transforms, all barriers decided."""
    decisions = [Decision(mask) for mask in masks]
    for table in _blocks(plan, Outcome(unit, 0)):
        yield from rows_in(apply_transforms(table, plan.transforms, decisions).rows)


def _blocks(plan: Plan, outcome: Outcome) -> Iterator[pa.Table]:
    """The usable rows of a unit, a block at a time, those that are not counted and put into quarantine."""
    unit, records = outcome.unit, Records(outcome.unit, plan.columns)
    parsed: list[tuple[int, int, Row]] = []
    filled = 0
    for record in records:
        outcome.rows += 1
        try:
            row = parse_record(unit, record, plan.columns)
        except BadRow as error:
            _quarantine(outcome, record.offset, record.number, str(error))
            continue
        parsed.append((record.offset, record.number, row))
        filled += _ROW_CHARS + sum(len(span.text) for span in row.spans)
        if filled >= plan.block_chars:
            table, parsed, filled = to_table(parsed), [], 0
            yield table
    outcome.lines = records.lines
    if parsed:
        yield to_table(parsed)


def _packed(plan: Plan, outcome: Outcome, rows: pa.Table) -> Packed | None:
    """Tokenise, cut and pack the rows of a block; None if nothing is left."""
    found = tokenise(rows, tokeniser(plan.tokenizer_folder))
    offsets, numbers = rows["offset"].to_pylist(), rows["line"].to_pylist()
    for index, reason in found.bad:
        _quarantine(outcome, offsets[index], numbers[index], reason)
    fitted = fit(found, plan.max_length, plan.overlong)
    outcome.documents += fitted.rows
    outcome.split += fitted.split
    outcome.truncated += fitted.truncated
    outcome.filtered.update(fitted.filtered)
    if not np.any(fitted.pieces.lens):
        return None
    if fitted.groups is not None:
        outcome.pairs += int((fitted.groups == 2).sum())
    return pack(found.documents, fitted.pieces, plan.max_length, packing=plan.packing, groups=fitted.groups)


def _quarantine(outcome: Outcome, offset: int, line: int, reason: str) -> None:
    outcome.bad[reason] += 1
    outcome.quarantined.append({"file": outcome.unit.file, "offset": offset, "line": line, "reason": reason})
