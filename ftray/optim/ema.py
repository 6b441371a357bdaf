"""Exponential moving average of what trains (Polyak & Juditsky, 1992).

It is an optimiser to everybody else: its state is one tensor a parameter, so it is saved, sharded, restored and
skipped (when a step is not applied) by the code that does so for moments, under every strategy.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch


class Ema(torch.optim.Optimizer):
    """`average = decay * average + (1 - decay) * parameter` after each step; the first step begins it.

    Args:
        parameters: what trains.
        decay: weight of the past.
    """

    own_keys: ClassVar[frozenset[str]] = frozenset({"ema"})
    """State of a parameter that is this optimiser's, not that of the one that moves it."""

    def __init__(self, parameters: Iterable[torch.Tensor], decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "decay": decay})
        self._swapped: Callable[[], None] | None = None

    def over(
        self, tensors: Sequence[torch.Tensor], state: Any, changed: Callable[[], None]
    ) -> torch.optim.Optimizer:
        """The same average over other tensors that hold the parameters (`ftray.strategy.base.Follower`)."""
        found = Ema(tensors, self.defaults["decay"])
        found.state, found._swapped = state, changed
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take in the parameters as they are now."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "ema" in state:
                    state["ema"].lerp_(parameter, 1.0 - group["decay"])
                else:
                    state["ema"] = parameter.detach().clone()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their averages in place; those without an average stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if "ema" in self.state[parameter]:
                    average = self.state[parameter]["ema"]
                    kept = parameter.detach().clone()
                    parameter.copy_(average)
                    average.copy_(kept)
        if self._swapped is not None:
            self._swapped()


@contextlib.contextmanager
def averaged(model: Any, optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Inside the block the model has the averaged weights, if one of the optimisers keeps them."""
    found = [optimizer for optimizer in optimizers if isinstance(optimizer, Ema)]
    for ema in found:
        ema.swap()
    _drop_gathered(model if found else None)
    try:
        yield
    finally:
        for ema in found:
            ema.swap()
        _drop_gathered(model if found else None)


def _drop_gathered(model: Any) -> None:
    """A sharded module may hold on to whole weights gathered for a forward pass; they are stale now."""
    for module in model.modules() if model is not None else ():
        if callable(reshard := getattr(module, "reshard", None)):
            reshard()
