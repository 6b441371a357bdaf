"""Which tokens go through which adapter."""

import contextlib
from collections.abc import Iterator, Sequence

Segment = tuple[str | None, int, int]


class Route:
    """Router shared by all adapted layers of one model.

    A forward pass sees tokens flattened to one axis. Either all of them use `active` (None: the bare base), or
    `segments` says `(adapter or None, start, stop)` for contiguous stretches that cover the axis in order. One
    adapter, a population, a reference policy and a mixed serving batch are the same mechanism.

    The route must stay as it is until `backward()` has returned: activation checkpointing runs layers again.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self.segments: Sequence[Segment] | None = None

    @contextlib.contextmanager
    def use(self, active: str | None = None, segments: Sequence[Segment] | None = None) -> Iterator[None]:
        """Route all tokens (or the segments) inside the block, then as before."""
        before = self.active, self.segments
        self.active, self.segments = active, segments
        try:
            yield
        finally:
            self.active, self.segments = before
