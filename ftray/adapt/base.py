"""What an adaptation method is: it says what trains, and how that is saved as a delta."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

Tensors = Iterable[tuple[str, torch.Tensor]]
"""Named tensors that exist one at a time."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a method can do on a model; one checker compares facts, no pairwise `if`s."""

    kind: Literal["low_rank", "replacement"]
    """Kind of the delta it makes."""
    mergeable: bool
    """The delta can be folded into the base's weights."""
    mixed_batch: bool
    """Rows under different deltas of this kind can share one forward pass."""
    detachable: bool = False
    """The base lies unchanged beneath it: with the delta off, the model is what it was before."""


TRAINED = "default"
"""Name of the adapter that a training run trains."""


class Adapt(Protocol):
    """One method: one file and one line in the catalog."""

    def facts(self) -> Facts:
        """What this method can do."""
        ...

    def apply(self, model: Any, seed: int) -> None:
        """Insert what the method needs and mark, by `requires_grad`, what trains."""
        ...

    def save(self, model: Any, trained: Tensors, folder: Path, base_name: str) -> None:
        """Write the trained delta in the format its readers know (PEFT, transformers).

        Args:
            model: the structure; its own tensors may be shards.
            trained: what trained by name, whole, in CPU memory, one tensor at a time; all of it is taken.
            folder: where to.
            base_name: how the recipe names the base.
        """
        ...


class Named(Adapt, Protocol):
    """A method of which a model has several at once, by name: its deltas share a batch, and the base trains not."""

    def apply(self, model: Any, seed: int, name: str = TRAINED) -> None:
        """As of any method; what has that name already gives way."""
        ...

    def save(self, model: Any, trained: Tensors, folder: Path, base_name: str, name: str = TRAINED) -> None:
        """As of any method."""
        ...

    def parameters(self, model: Any, name: str) -> dict[str, torch.nn.Parameter]:
        """What trains under a name, by the names it has as `TRAINED`."""
        ...

    def remove(self, model: Any, name: str) -> None:
        """Take what has a name out of the model."""
        ...
