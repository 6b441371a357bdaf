"""What a prepare-time transform is, and how a list of them is applied.

A transform is a pure function on a table of rows (`ftray.data.rows.ROW_SCHEMA`). A barrier needs to see a key
of every row of the data set before it can say which rows stay: one pass for the keys, then a decision. So a
barrier cannot be part of a stream, which is trained on while it is read, unless it only looks back.

A class that declares `stage = "read"` changes packed rows when they are read instead (`read_time.py`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray import catalog
from ftray.core.errors import DataError

Mask = npt.NDArray[np.bool_]
"""True where a row stays."""


class Applied(NamedTuple):
    """What a transform made of some rows."""

    rows: pa.Table
    """The rows that stay."""
    filtered: Counter[str]
    """Rows filtered out, by rule; a row is counted once."""
    changed: Mapping[str, int] = MappingProxyType({})
    """What else was done, by rule (for example rows repaired or values replaced)."""


@runtime_checkable
class RowTransform(Protocol):
    """Changes or filters rows, each by itself."""

    def __call__(self, rows: pa.Table) -> Applied | tuple[pa.Table, Counter[str]]:
        """The rows that stay, and counts by rule."""


Decider = Callable[[list[list[bytes]]], list[Mask]]
"""From the keys of work units to the rows that stay of each."""


@runtime_checkable
class Barrier(Protocol):
    """Filters rows by a comparison over the whole data set, at preparation."""

    rule: str
    """Name under which filtered rows are counted."""

    def keys(self, rows: pa.Table) -> list[bytes]:
        """What is compared, one for each row."""

    def keep(self, keys: list[list[bytes]]) -> list[Mask]:
        """Which rows stay, from the keys of all work units in their order."""


@runtime_checkable
class RunningBarrier(Barrier, Protocol):
    """A barrier that decides about a row by the rows before it alone, so that a stream can have it."""

    def running(self) -> Decider:
        """Decisions that begin anew; asked about all work units once, in their order, some at a time."""


class Decision:
    """A barrier's mask of a work unit, which is taken up as the unit's rows come.

    Args:
        mask: for each row of the unit that reaches the barrier.
    """

    def __init__(self, mask: Mask) -> None:
        self._mask, self._taken = mask, 0

    def take(self, count: int) -> Mask:
        """The decision about the next rows. Raises `DataError` if there are more than when it was made."""
        found = self._mask[self._taken : self._taken + count]
        if len(found) != count:
            raise DataError("data: a source file changed while it was being prepared; start again")
        self._taken += count
        return found


@dataclass
class Transformed:
    """Rows after the transforms."""

    rows: pa.Table
    filtered: Counter[str] = field(default_factory=Counter)
    """Rows filtered out, by `transform.rule`."""
    changed: Counter[str] = field(default_factory=Counter)
    """What else was done, by `transform.rule`."""
    keys: list[bytes] | None = None
    """Set if a barrier without a decision was met: the keys it asks for."""


def apply_transforms(
    rows: pa.Table, transforms: Sequence[RowTransform | Barrier], decisions: Sequence[Decision]
) -> Transformed:
    """Apply transforms in order; `decisions` are those of the barriers among them, as far as known."""
    result, known = Transformed(rows), iter(decisions)
    for transform in transforms:
        name = catalog.name_of(type(transform)) or type(transform).__name__
        if isinstance(transform, Barrier):
            decision = next(known, None)
            if decision is None:
                result.keys = transform.keys(result.rows)
                return result
            mask = decision.take(result.rows.num_rows)
            applied = Applied(
                result.rows.filter(pa.array(mask)), Counter({transform.rule: int((~mask).sum())})
            )
        else:
            applied = Applied(*transform(result.rows))
        result.rows = applied.rows
        for total, counts in ((result.filtered, applied.filtered), (result.changed, applied.changed)):
            total.update({f"{name}.{rule}": count for rule, count in counts.items() if count})
    return result
