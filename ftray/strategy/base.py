"""How a step is spread over workers. The training loop has no branch on a strategy's name.

The data-parallel rank and size come from here and never from the world, so that tensor or context parallelism
can divide the world further without touching data order, loss counts or seeds.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

Parameters = Mapping[str, torch.nn.Parameter]
"""What trains, by name."""
Optimizers = Sequence[torch.optim.Optimizer]
"""Built from the same parameters."""


@dataclasses.dataclass(frozen=True)
class Update:
    """What `update` did."""

    grad_norm: float
    """Norm of the whole gradient before clipping."""
    applied: bool
    """False if loss or gradient was not finite: then no parameter moved, on any rank."""


@runtime_checkable
class Follower(Protocol):
    """An optimiser that moves nothing: after each step it takes in the parameters as they are."""

    def over(
        self, tensors: Sequence[torch.Tensor], state: Any, changed: Callable[[], None]
    ) -> torch.optim.Optimizer:
        """The same over tensors that hold the parameters in another form.

        Args:
            tensors: what is stepped in place of the parameters.
            state: where the state of each lies, that of other optimisers included.
            changed: to be called when something was written to the tensors.
        """
        ...


class Snapshot(Protocol):
    """This rank's part of the trainable state at one step; training may go on while it is written."""

    layout: str
    """Name of the files' format; a strategy restores the layouts it knows."""
    rank: int
    """Which of the writers this rank is; one that is not among them writes nothing."""
    num_writers: int
    """How many ranks write a part."""

    def write(self, folder: Path) -> list[str]:
        """Write this rank's files into a folder that all ranks share; returns their names.

        It may run in a thread beside the training loop, so it holds no collective.
        """
        ...


class Strategy(Protocol):
    """One way to spread a run."""

    num_workers: int | tuple[int, int]

    @property
    def shards(self) -> frozenset[str]:
        """What is divided over the ranks, of `weights`, `gradients` and `optimizer`; the rest is whole on each.

        `masters`: each rank steps its range of float32 copies of all that trains, an adapter included.
        """
        ...

    @property
    def in_process(self) -> bool:
        """True if the run needs no worker group."""
        ...

    @property
    def dp_rank(self) -> int:
        """This process's place among those that see different rows."""
        ...

    @property
    def dp_size(self) -> int:
        """How many processes see different rows."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this rank computes: its own GPU if there is one, else the CPU."""
        ...

    @property
    def weights_device(self) -> torch.device:
        """Where the base's weights lie between uses: `device`, or the CPU if they are offloaded."""
        ...

    def check_optimizers(self, optimizers: Optimizers) -> None:
        """Look at optimisers, maybe over tensors without storage, before anything is started.

        Raises:
            ConfigError: if the strategy cannot step them.
        """
        ...

    def prepare(self, model: Any, *, bf16: bool) -> Any:
        """Spread a structure that is still on meta; `bf16`: it will be computed in bfloat16 for certain."""
        ...

    def keep_part(self, model: Any, parameter: torch.nn.Parameter) -> None:
        """Drop what this rank does not keep of a whole weight of `model` that was just read.

        For strategies whose shards are no tensors on meta that could be read into.
        """
        ...

    def attach(self, model: Any, optimizers: Optimizers) -> list[torch.optim.Optimizer]:
        """Take a loaded model and the optimisers built for it, before anything is restored or computed.

        Returns:
            The optimisers whose learning rates are to be set from now on.

        Raises:
            ConfigError: if the strategy cannot step such an optimiser.
        """
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro batch's gradients."""
        ...

    def update(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizers: Optimizers,
        max_grad_norm: float | None,
        *,
        sound: bool,
    ) -> Update:
        """Reduce, clip and step as one call (DeepSpeed owns all three); gradients are cleared.

        Nothing moves if the gradient is not finite, or if `sound` is False because the loss is not.
        """
        ...

    def snapshot(self, parameters: Parameters, optimizers: Optimizers, *, copy: bool = True) -> Snapshot:
        """This rank's part of parameters and optimiser state, in CPU memory. Called on every rank.

        Without `copy` the tensors may be the live ones: it must be written before the next step.
        """
        ...

    def restore(
        self, folder: Path, manifest: Mapping[str, Any], parameters: Parameters, optimizers: Optimizers
    ) -> None:
        """Load the tensors of a committed checkpoint, of any world size where the strategy can.

        Raises:
            CheckpointError: naming the remedy, where it cannot.
        """
        ...

    def full_parameters(self, parameters: Parameters) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole tensors in CPU memory, one at a time; every rank must iterate to the end."""
        ...

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the data-parallel ranks."""
        ...

    def share(self, value: Any) -> Any:
        """Rank 0's value of a plain object, on every rank."""
        ...

    def barrier(self) -> None:
        """Return when every rank has come here."""
        ...
