"""Which tokens go through which adapter."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch

Segment = tuple[str | None, int, int]


class Route:
    """Router shared by all adapted layers of one model.

    A forward pass sees tokens flattened to one axis. Either all of them use `active` (None: the bare base), or
    `segments` says `(adapter or None, start, stop)` for contiguous stretches that cover the axis in order. One
    adapter, a population, a reference policy and a mixed serving batch are the same mechanism.

    `noise` has a key for each segment: what dropout draws there depends on that key and the layer's name, and so on
    nothing else that is in the pass.

    The route must stay as it is until `backward()` has returned: activation checkpointing runs layers again.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self.segments: Sequence[Segment] | None = None
        self.noise: Sequence[str] = ()

    @contextlib.contextmanager
    def use(
        self,
        active: str | None = None,
        segments: Sequence[Segment] | None = None,
        noise: Sequence[str] = (),
    ) -> Iterator[None]:
        """Route all tokens (or the segments) inside the block, then as before."""
        before = self.active, self.segments, self.noise
        self.active, self.segments, self.noise = active, segments, noise
        try:
            yield
        finally:
            self.active, self.segments, self.noise = before

    def seed(self, segment: int, layer: str) -> int:
        """Seed of a segment's dropout in one layer; drawn from PyTorch's own generator if there is no key."""
        if not self.noise or not self.noise[segment]:
            return int(torch.randint(2**62, ()))
        key = f"{self.noise[segment]}:{layer}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
