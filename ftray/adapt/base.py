"""What an adaptation method is: it says what trains, and how that is saved as a delta."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, Protocol


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a method can do on a model; one checker compares facts, no pairwise `if`s."""

    kind: Literal["low_rank", "replacement"]
    """Kind of the delta it makes."""
    mergeable: bool
    """The delta can be folded into the base's weights."""
    mixed_batch: bool
    """Rows under different deltas of this kind can share one forward pass."""


class Adapt(Protocol):
    """One method: one file and one line in the catalog."""

    def facts(self) -> Facts:
        """What this method can do."""
        ...

    def apply(self, model: Any, seed: int) -> None:
        """Insert what the method needs and mark, by `requires_grad`, what trains."""
        ...

    def save(self, model: Any, folder: Path, base_name: str) -> None:
        """Write the trained delta in the format its readers know (PEFT, transformers)."""
        ...
