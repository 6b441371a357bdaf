"""This rank's part of a tensor, whether it is sharded or whole."""

from typing import TypeVar

import torch
from torch.distributed.tensor import DTensor

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape of a part of a tensor."""
T = TypeVar("T", bound=torch.Tensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that this rank holds of a tensor; a whole tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor, whatever this rank holds of it.

    DeepSpeed's stage 3 leaves an empty tensor in a parameter's place and keeps its real shape beside it.
    """
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def region(tensor: torch.Tensor) -> Region:
    """Where this rank's part lies in the whole tensor; its shape has a 0 if the rank holds nothing of it."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def with_local(whole: T, part: torch.Tensor) -> T:
    """A tensor spread as `whole` is, over which this rank holds `part`."""
    if not isinstance(whole, DTensor):
        return part  # type: ignore[return-value]
    return DTensor.from_local(  # type: ignore[return-value]
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
