"""What the ranks of a run do about an error that only some of them meet."""

import contextlib
from collections.abc import Iterator

import torch

from ftray.core.errors import FtrayError, TrainError
from ftray.strategy.base import Strategy


@contextlib.contextmanager
def agreed(strategy: Strategy) -> Iterator[None]:
    """A block that every rank enters and that fails on all of them if it does on any.

    A rank that went on alone would wait in its next collective for those that did not. Inside the block there
    must be no collective behind what may fail on one rank only.

    Raises:
        FtrayError: this rank's own; else rank 0's; else one that says to look at the other ranks' logs.
    """
    own: FtrayError | None = None
    try:
        yield
    except FtrayError as error:
        own = error
    first: FtrayError | None = strategy.share(own)
    failed = bool(strategy.sum(torch.tensor([float(own is not None)])))
    told = own or first
    if told is not None:
        raise told
    if failed:
        raise TrainError("another rank of the group failed where this one did not; see its log")
