"""Transforms that are applied when rows are read: another draw in every epoch, and nothing is prepared anew.

What one makes of a row is a pure function of the row and of (seed, epoch, row), so it does not depend on the number
of workers, on the batch, or on where a run was interrupted.
"""

import hashlib
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from ftray import catalog
from ftray.core.errors import DataError
from ftray.data.read import RowArrays


class ReadTransform(Protocol):
    """Changes a packed row when it is read; declared by `stage = "read"`.

    It may drop tokens and documents, or change them and what is learnt of them; a row keeps at least one token.
    """

    stage: ClassVar[str]
    """`read`."""
    for_pairs: ClassVar[bool]
    """True if the answers of a preference pair can still be compared after it."""
    for_validation: ClassVar[bool]
    """True if validation rows are changed as well (with the draw of epoch 0)."""

    def read(self, row: RowArrays, random: np.random.Generator) -> RowArrays:
        """The row as it is trained on; the arrays that come in are read-only."""
        ...


class ReadTime:
    """A recipe's read-time transforms, ready to be applied.

    Args:
        transforms: in their order.
        seed: the run's seed.
        pairs: the rows are preference pairs.
        validation: apply only those that are for validation rows as well.

    Raises:
        DataError: if the rows are pairs and a transform is not for them.
    """

    def __init__(
        self, transforms: Sequence[ReadTransform], seed: int, *, pairs: bool, validation: bool = False
    ) -> None:
        self._seed = seed
        # The number keeps two of the same kind apart, and a draw the same whether or not others are left out.
        self._steps = [(n, t) for n, t in enumerate(transforms) if t.for_validation or not validation]
        for transform in transforms:
            if pairs and not transform.for_pairs:
                name = catalog.name_of(type(transform)) or type(transform).__name__
                raise DataError(f"data.transforms: `{name}` is not for preference pairs; leave it out")

    def __call__(self, row: RowArrays, index: int, epoch: int) -> RowArrays:
        """Row `index` of the data set as it is in an epoch; a padding row (-1) stays as it is."""
        if index < 0:
            return row
        for number, transform in self._steps:
            row = transform.read(row, _generator(self._seed, epoch, index, number))
        return row

    def __bool__(self) -> bool:
        return bool(self._steps)


def _generator(seed: int, epoch: int, index: int, number: int) -> np.random.Generator:
    name = f"{seed}:{epoch}:{index}:{number}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), "<u8")
    return np.random.Generator(np.random.Philox(key=key))
