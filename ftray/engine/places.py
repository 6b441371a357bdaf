"""What reads deltas and holds them: the seam between slots and a model."""

from typing import Any, Protocol

from ftray.core.errors import DeltaError


class OwnWeightsError(DeltaError):
    """A delta that becomes a whole model in memory: `Places.read_own` reads it, where there is room."""


class HostDelta(Protocol):
    """A delta in memory, checked and ready to be put in place."""

    @property
    def digest(self) -> str:
        """Digest of what answers."""
        ...

    @property
    def kind(self) -> str:
        """`low_rank`, ..."""
        ...

    @property
    def mixed_batch(self) -> bool:
        """Rows under it can share a step with rows under others."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of its tensors."""
        ...


class Places(Protocol):
    """What deltas are read by and put into."""

    def read(self, folder: str) -> HostDelta:
        """Read a delta; may run beside a step.

        Raises:
            OwnWeightsError: if it has weights of its own; they are not read.
            DeltaError: if it cannot be used.
        """
        ...

    def read_own(self, folder: str) -> HostDelta:
        """Read a delta with weights of its own; may run beside a step. Raises `DeltaError`."""
        ...

    def load(self, key: str, delta: Any) -> None:
        """Put a delta that was read in place under a key."""
        ...

    def unload(self, key: str) -> None:
        """Remove the delta of a key."""
        ...
