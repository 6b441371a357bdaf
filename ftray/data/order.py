"""The order of training rows: a pure function of (seed, position), whatever the number of workers.

Global batch k holds positions [k*G, (k+1)*G) of an endless sequence: epoch after epoch, in each the windows of the
data set in their order, in each window its rows in a keyed permutation. A small data set is one window; of a large
one, only the shards of a window or two are read at a time, and a window can be trained while the next is prepared.
A permutation is a Feistel network over the next even power of two with cycle walking (Black & Rogaway,
"Ciphers with arbitrary finite domains", 2002), so that any index is computed in O(1) memory and no list of
rows is ever shuffled or stored. The cursor of a run is the one integer k.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
PADDING = -1
"""Row index of a zero-weight row that fills up a rank's slice."""


class Permutation:
    """A keyed bijection of [0, n).

    Args:
        n: number of rows.
        seed: the run's seed.
        epoch: which pass over the rows.
        window: which window of them.
    """

    def __init__(self, n: int, seed: int, epoch: int, window: int = 0) -> None:
        assert n > 0
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        name = f"{n}:{seed}:{epoch}" + (f":{window}" if window else "")
        key = hashlib.blake2b(name.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(key, "<u8")

    def __call__(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Row indices at `positions`, each in [0, n)."""
        x = self._encrypt(np.asarray(positions, np.uint64))
        # Values outside [0, n) walk along their cycle until they fall inside; the cycle of a point
        # inside always comes back, and the domain is at most 4n, so a few walks are enough.
        outside = x >= self.n
        while outside.any():
            x[outside] = self._encrypt(x[outside])
            outside = x >= self.n
        return x.astype(np.int64)

    def _encrypt(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Two rounds of the splitmix64 finaliser (wrapping uint64 arithmetic)."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(32))


@dataclass(frozen=True)
class Order:
    """Which rows each global batch holds.

    Raises:
        ValueError: if there are no rows or the batch is empty.
    """

    num_rows: int
    """Rows of the data set (of the windows that are ready, while it is being prepared)."""
    global_batch_size: int
    """Rows in one optimiser step over all workers."""
    seed: int
    """The run's seed."""
    windows: tuple[int, ...] = ()
    """Rows of each window, in order; empty: one window."""
    offset: int = 0
    """Position at which batch 0 would begin; not 0 once a run has gone on with another batch size."""
    _ends: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.global_batch_size < 1:
            raise ValueError(f"an order needs rows and a batch size of at least 1: {self}")
        # Kept, since a large data set has thousands of windows and every batch asks where they end.
        object.__setattr__(self, "_ends", np.cumsum(self.windows or (self.num_rows,), dtype=np.int64))
        assert self._ends[-1] == self.num_rows

    def batch(self, k: int) -> npt.NDArray[np.int64]:
        """Row indices of global batch `k`, [global_batch_size]."""
        start = self.position(k)
        return self.rows(np.arange(start, start + self.global_batch_size))

    def part(self, k: int, dp_rank: int, dp_size: int) -> npt.NDArray[np.int64]:
        """One rank's rows of global batch `k`, as `dp_slice`, without computing those of the others."""
        start = self.position(k)
        rows = dp_slice(np.arange(start, start + self.global_batch_size), dp_rank, dp_size)
        mine = rows != PADDING
        rows[mine] = self.rows(rows[mine])
        return rows

    def rows(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row indices at positions of the endless sequence, in ascending positions."""
        return windowed(positions, self._ends, self.seed)

    def epochs(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The pass over the data set (over its source, in a mixture) that each ascending position is part of."""
        return positions // self.num_rows

    def part_epochs(self, k: int, dp_rank: int, dp_size: int) -> npt.NDArray[np.int64]:
        """`epochs` of one rank's rows of global batch `k`, -1 for those that fill it up; as `part`."""
        start = self.position(k)
        positions = dp_slice(np.arange(start, start + self.global_batch_size), dp_rank, dp_size)
        mine = positions != PADDING
        positions[mine] = self.epochs(positions[mine])
        return positions

    def position(self, k: int) -> int:
        """Position of the first row of global batch `k`."""
        return self.offset + k * self.global_batch_size

    def epoch(self, k: int) -> float:
        """Passes over the data made when batches 0 to k-1 are done."""
        return self.position(k) / self.num_rows


def windowed(
    positions: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.int64]:
    """Row indices at ascending positions of epoch after epoch, each a permutation inside every window.

    Args:
        positions: ascending, from 0.
        ends: one past the last row of each window.
        seed: the run's seed.
    """
    epochs, places = np.divmod(positions, ends[-1])
    numbers = np.searchsorted(ends, places, side="right")
    rows = np.empty_like(positions)
    # Ascending positions lie in few (epoch, window) pairs, each a run of its own.
    changes = np.flatnonzero((np.diff(epochs) != 0) | (np.diff(numbers) != 0)) + 1
    for part in np.split(np.arange(len(positions)), changes):
        if len(part):
            number = int(numbers[part[0]])
            begin = int(ends[number - 1]) if number else 0
            permutation = Permutation(int(ends[number]) - begin, seed, int(epochs[part[0]]), number)
            rows[part] = begin + permutation(places[part] - begin)
    return rows


def dp_slice(indices: npt.NDArray[np.int64], dp_rank: int, dp_size: int) -> npt.NDArray[np.int64]:
    """One rank's contiguous part of a global batch.

    Every rank gets the same number of rows; where the batch does not divide, the last ranks get `PADDING`
    (-1), the index of a zero-weight row. The parts of all ranks one after another are the global batch.
    """
    assert 0 <= dp_rank < dp_size
    size = -(-len(indices) // dp_size)
    part = indices[dp_rank * size : (dp_rank + 1) * size]
    return np.concatenate([part, np.full(size - len(part), PADDING, np.int64)])
