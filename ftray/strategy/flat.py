"""Contiguous parts of flattened tensors, saved and read as the pieces that every strategy reads.

DeepSpeed's ZeRO gives each rank a range of a tensor's elements in memory order, which may begin and end in the
middle of a row. A range is cut into at most `2 * ndim - 1` boxes, and boxes are what a checkpoint holds.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from ftray.model.shard import Region
from ftray.strategy.pieces import Reader


@dataclasses.dataclass(frozen=True)
class Part:
    """What one rank holds of one parameter, inside a flat buffer that an optimiser steps."""

    name: str
    """The parameter."""
    shape: tuple[int, ...]
    """Its whole shape."""
    start: int
    """First element of the range, in memory order."""
    flat: torch.Tensor
    """The buffer: the key of the optimiser's state."""
    offset: int
    """Where in the buffer the range begins."""
    numel: int
    """Elements of the range; 0 if this rank holds nothing."""

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """This part's view of a tensor that is laid out as the buffer."""
        return buffer.detach().narrow(0, self.offset, self.numel)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Region, slice]]:
    """Elements `[start, stop)` of a tensor in memory order, as boxes.

    Yields:
        Offset and shape of a box, and which elements of the range it is.
    """
    yield from _boxes(tuple(shape), start, stop, (), start)


def _boxes(
    shape: tuple[int, ...], start: int, stop: int, above: tuple[int, ...], origin: int
) -> Iterator[tuple[Region, slice]]:
    """As `boxes`, below the indices `above` of the outer axes; `start` and `stop` count inside that block."""
    if start >= stop:
        return
    if not shape:
        yield (above, (1,) * len(above)), slice(0, 1)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _inside(shape, last, start, stop, above, origin)
        return
    yield from _inside(shape, first - 1, start, first * row, above, origin)
    if first < last:
        offset, size = (
            above + (first,) + (0,) * (len(shape) - 1),
            (1,) * len(above) + (last - first, *shape[1:]),
        )
        begin = first * row - origin
        yield (offset, size), slice(begin, begin + (last - first) * row)
    yield from _inside(shape, last, last * row, stop, above, origin)


def _inside(
    shape: tuple[int, ...], index: int, start: int, stop: int, above: tuple[int, ...], origin: int
) -> Iterator[tuple[Region, slice]]:
    base = index * math.prod(shape[1:])
    yield from _boxes(shape[1:], start - base, stop - base, (*above, index), origin - base)


def read_range(reader: Reader, name: str, shape: Sequence[int], start: int, numel: int) -> torch.Tensor:
    """Elements `[start, start + numel)` of a saved tensor, flat.

    Raises:
        CheckpointError: if a piece is missing.
    """
    found = torch.empty(numel)
    for number, (region, where) in enumerate(boxes(shape, start, start + numel)):
        data = reader.read(name, region).reshape(-1)
        if not number:
            found = found.to(data.dtype)
        found[where] = data
    return found
