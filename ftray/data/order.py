"""The order of training rows: a pure function of (seed, position), whatever the number of workers.

Global batch k holds positions [k*G, (k+1)*G) of the endless concatenation of one keyed permutation per epoch.
A permutation is a Feistel network over the next even power of two with cycle walking (Black & Rogaway,
"Ciphers with arbitrary finite domains", 2002), so that any index is computed in O(1) memory and no list of
rows is ever shuffled or stored. The cursor of a run is the one integer k.
"""

import hashlib
from dataclasses import dataclass

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
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        assert n > 0
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        key = hashlib.blake2b(f"{n}:{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
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
    """Rows of the data set."""
    global_batch_size: int
    """Rows in one optimiser step over all workers."""
    seed: int
    """The run's seed."""

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.global_batch_size < 1:
            raise ValueError(f"an order needs rows and a batch size of at least 1: {self}")

    def batch(self, k: int) -> npt.NDArray[np.int64]:
        """Row indices of global batch `k`, [global_batch_size]."""
        start = k * self.global_batch_size
        stop = start + self.global_batch_size
        parts = []
        while start < stop:
            epoch, position = divmod(start, self.num_rows)
            count = min(stop - start, self.num_rows - position)
            permutation = Permutation(self.num_rows, self.seed, epoch)
            parts.append(permutation(np.arange(position, position + count)))
            start += count
        return np.concatenate(parts)

    def epoch(self, k: int) -> float:
        """Passes over the data made when batches 0 to k-1 are done."""
        return k * self.global_batch_size / self.num_rows


def dp_slice(indices: npt.NDArray[np.int64], dp_rank: int, dp_size: int) -> npt.NDArray[np.int64]:
    """One rank's contiguous part of a global batch.

    Every rank gets the same number of rows; where the batch does not divide, the last ranks get `PADDING`
    (-1), the index of a zero-weight row. The parts of all ranks one after another are the global batch.
    """
    assert 0 <= dp_rank < dp_size
    size = -(-len(indices) // dp_size)
    part = indices[dp_rank * size : (dp_rank + 1) * size]
    return np.concatenate([part, np.full(size - len(part), PADDING, np.int64)])
