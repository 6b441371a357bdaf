"""An objective of a user's own in which everything goes wrong that can: it hangs, or is not finite on one rank."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.objective.lm import SupervisedFineTuning

_HANGS = {
    "sleep": lambda: time.sleep(1000),
    "gil": lambda: sum(range(10**14)),  # one call into C that no signal interrupts
    "stop": lambda: (os.kill(os.getpid(), signal.SIGSTOP), time.sleep(1000)),
}


class _Infinite(torch.autograd.Function):
    """The loss as it is, an infinite gradient."""

    @staticmethod
    def forward(ctx: object, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


@spec
class Faulty(SupervisedFineTuning):
    """Supervised fine-tuning with a fault in training call `at` (from 1) of each process, on one rank."""

    hang: str = ""
    """`sleep`, `gil` or `stop`: hang in that way."""
    spoil: str = ""
    """`loss`: it is not a number; `gradient`: it is infinite though the loss is right."""
    at: int = 1
    times: int = 1
    """Calls in a row that are spoilt."""
    rank: int = 0
    once: str = ""
    """A file that is made before the fault; where it is, there is none any more."""

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        found = super().sums(policy, batch)
        rank = dist.get_rank() if dist.is_initialized() else 0
        if not torch.is_grad_enabled() or rank != self.rank:
            return found
        calls = _CALLS[id(self)] = _CALLS.get(id(self), 0) + 1
        if not self.at <= calls < self.at + self.times or (self.once and Path(self.once).exists()):
            return found
        if self.once:
            Path(self.once).touch()
        if self.hang:
            _HANGS[self.hang]()
        if self.spoil == "loss":
            return {"nll": found["nll"] * float("nan")}
        if self.spoil == "gradient":
            return {"nll": _Infinite.apply(found["nll"])}
        return found


_CALLS: dict[int, int] = {}
