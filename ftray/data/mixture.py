"""Sources mixed by weights: which source each position of the order draws from, and which of its rows.

A position is given to the first source or to the rest by comparing `floor(position * share)` with the next one's,
and the rest is divided in the same way. So each source gets its share of any stretch of the sequence to within a
row or so, a position's source and place are computed without looking at other positions, and what is drawn is a
pure function of (seed, position). Within a source the rows come in the order of `ftray.data.order`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ftray.core.errors import DataError
from ftray.data.order import Order, windowed

Ints = npt.NDArray[np.int64]

_MIN_SHARE = 1e-6
"""Of what is rarer, not one row would come in a training of usual length."""
_BITS = 30
"""Shares are multiples of 2^-30; products with positions stay exact in 64 bits."""


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    name: str
    """As the recipe names it."""
    weight: float
    """Share of the rows, before shares are divided by their sum."""
    row_ids: tuple[tuple[int, int], ...]
    """Ranges [start, stop) of its rows in the data set, one for each window."""
    max_epochs: float | None = None
    """Passes over the source after which its share goes to the others; None: no limit."""

    @property
    def num_rows(self) -> int:
        """Rows of the source."""
        return sum(stop - start for start, stop in self.row_ids)

    @property
    def cap(self) -> int | None:
        """Rows drawn from it at most."""
        return None if self.max_epochs is None else max(1, round(self.max_epochs * self.num_rows))


@dataclass(frozen=True)
class _Stage:
    """A stretch of the sequence in which the same sources take part."""

    start: int
    """First position."""
    counts: tuple[int, ...]
    """Rows drawn from every source before it."""
    active: tuple[int, ...]
    """Sources that take part."""


@dataclass(frozen=True)
class Mixture(Order):
    """An order over several sources.

    Raises:
        DataError: for a weight next to nothing; by `rows`, for a position after which every source has reached its
            `max_epochs`.
    """

    parts: tuple[Part, ...] = ()
    """The sources."""
    _stages: tuple[_Stage, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        total = sum(part.weight for part in self.parts)
        for part in self.parts:
            if part.weight < _MIN_SHARE * total:
                raise DataError(
                    f"data.mixture: {part.name}: weight {part.weight:g} is less than a millionth of all; "
                    "give it more, or leave it out"
                )
        stages = [_Stage(0, (0,) * len(self.parts), tuple(range(len(self.parts))))]
        while (after := self._next_stage(stages[-1])) is not None:
            stages.append(after)
        object.__setattr__(self, "_stages", tuple(stages))

    def rows(self, positions: Ints) -> Ints:
        """Row indices at ascending positions."""
        sources, places = self.draw(positions)
        rows = np.empty_like(positions)
        for number, part in enumerate(self.parts):
            mine = sources == number
            if mine.any():
                rows[mine] = source_rows(part, places[mine], self.seed, number)
        return rows

    def epochs(self, positions: Ints) -> Ints:
        """The pass over its source that each ascending position is part of."""
        sources, places = self.draw(positions)
        passes: Ints = places // np.array([part.num_rows for part in self.parts])[sources]
        return passes

    def draw(self, positions: Ints) -> tuple[Ints, Ints]:
        """The source of each ascending position, and how many rows were drawn from that source before."""
        sources, places = np.empty_like(positions), np.empty_like(positions)
        starts = np.array([stage.start for stage in self._stages])
        stage_of = np.searchsorted(starts, positions, side="right") - 1
        for number, stage in enumerate(self._stages):
            mine = stage_of == number
            if not mine.any():
                continue
            if not stage.active:
                names = ", ".join(part.name for part in self.parts)
                raise DataError(
                    f"data.mixture: every source has reached its `max_epochs` after {stage.start} rows "
                    f"({names}); raise them or train fewer steps"
                )
            chosen, drawn = _split(positions[mine] - stage.start, self._shares(stage.active))
            active = np.array(stage.active)
            sources[mine] = active[chosen]
            places[mine] = drawn + np.array(stage.counts)[active[chosen]]
        return sources, places

    def _shares(self, active: Sequence[int]) -> list[int]:
        """Each active source's share of what the ones before it leave, in units of 2^-30; the last takes all."""
        weights = np.array([self.parts[number].weight for number in active])
        left = np.cumsum(weights[::-1])[::-1]
        return [round(w / rest * (1 << _BITS)) for w, rest in zip(weights, left, strict=True)]

    def _next_stage(self, stage: _Stage) -> _Stage | None:
        """What follows when the next source reaches its cap; None if no active one has a cap."""
        shares = self._shares(stage.active)
        ends = {}
        for place, number in enumerate(stage.active):
            cap = self.parts[number].cap
            if cap is not None:
                ends[number] = _first(shares, place, cap - stage.counts[number])
        if not ends:
            return None
        length = min(ends.values())
        counts = list(stage.counts)
        for place, number in enumerate(stage.active):
            counts[number] += _count(shares, place, length)
        active = tuple(number for number in stage.active if ends.get(number) != length)
        return _Stage(stage.start + length, tuple(counts), active)


def _split(positions: Ints, shares: Sequence[int]) -> tuple[Ints, Ints]:
    """Which source each position goes to, and its place among the positions of that source."""
    chosen, places = np.empty_like(positions), np.empty_like(positions)
    left = np.arange(len(positions))
    local = positions
    for number, share in enumerate(shares):
        before, after = _floor(local, share), _floor(local + 1, share)
        taken = after > before
        chosen[left[taken]] = number
        places[left[taken]] = before[taken]
        left, local = left[~taken], (local - before)[~taken]
    return chosen, places


def _floor(positions: Ints, share: int) -> Ints:
    """`floor(positions * share / 2^30)` without overflow below 2^60."""
    low = positions & ((1 << _BITS) - 1)
    return (positions >> _BITS) * share + ((low * share) >> _BITS)


def _count(shares: Sequence[int], place: int, length: int) -> int:
    """Positions in [0, length) that go to the source at `place`."""
    local = length
    for number, share in enumerate(shares):
        taken = local * share >> _BITS
        if number == place:
            return taken
        local -= taken
    raise AssertionError(place)


def _first(shares: Sequence[int], place: int, count: int) -> int:
    """The smallest length whose positions give `count` of them to the source at `place`."""
    high = 1
    while _count(shares, place, high) < count:
        high *= 2
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        if _count(shares, place, middle) < count:
            low = middle + 1
        else:
            high = middle
    return low


def source_rows(part: Part, places: Ints, seed: int, number: int) -> Ints:
    """Rows of the data set at ascending places of a source's own endless sequence."""
    lens = np.array([stop - start for start, stop in part.row_ids], np.int64)
    # Sources of equal size must not be shuffled alike.
    ends = np.cumsum(lens)
    local = windowed(places, ends, seed * 1_000_003 + number + 1)
    windows = np.searchsorted(ends, local, side="right")
    shifts: Ints = np.array([start for start, _ in part.row_ids], np.int64) - (ends - lens)
    return shifts[windows] + local
