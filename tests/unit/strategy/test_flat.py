"""Ranges of flattened tensors as boxes."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from ftray.strategy.flat import boxes


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_hold_exactly_the_range(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    tensor = torch.arange(numel).reshape(shape)
    found, count = torch.full((stop - start,), -1), 0
    for (offset, size), where in boxes(shape, start, stop):
        box = tensor[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        assert (found[where] == -1).all()
        found[where] = box.reshape(-1)
        count += 1
    assert torch.equal(found, torch.arange(start, stop))
    assert count <= max(1, 2 * len(shape) - 1)
