"""The step engine of every first-order method: accumulate gradients, reduce, clip, step.

The training loop calls `step` and knows nothing of `backward`: forward-only and roll-out engines fit the same
place.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence

import torch

from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.model.precision import autocast
from ftray.objective.base import Objective, loss_of
from ftray.strategy.base import Strategy


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one optimiser step did, over all ranks."""

    loss: float
    """Sum of the means of the objective's terms."""
    terms: Mapping[str, float]
    """Mean of each term, and of what the objective only logs."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    applied: bool
    """False if the loss or the gradient was not finite and nothing moved."""
    tokens: int
    """Tokens seen, over all ranks."""
    targets: float
    """Sum of the weights of the first term."""
    num_targets: int = 0
    """Tokens among them whose prediction entered the loss."""
    squared_lengths: float = 0.0
    """Sum of the squares of the documents' lengths: what attention costs grows with it."""


class FirstOrder:
    """Gradient descent on an objective.

    Args:
        policy: the model.
        objective: what is minimised.
        strategy: how the work is spread.
        parameters: what trains, by name.
        optimizers: built from the same parameters.
        max_grad_norm: clip above this norm; None never clips.
        bf16: compute the forward pass in bfloat16.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        strategy: Strategy,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        max_grad_norm: float | None,
        bf16: bool = False,
    ) -> None:
        self.policy, self.objective, self.strategy = policy, objective, strategy
        self.parameters, self.optimizers = dict(parameters), list(optimizers)
        self.bf16, self.max_grad_norm = bf16, max_grad_norm
        self._base_rates = [
            [group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers
        ]

    def step(self, batches: Sequence[Batch], scale: float) -> StepReport:
        """One optimiser step over this rank's micro batches, at `scale` times the base learning rate."""
        names, weights, counts = self._totals(batches)
        sums = torch.zeros(len(names), dtype=torch.float64)
        for batch in batches:
            loss, batch_sums = self._forward(batch, names, weights)
            self.strategy.backward(loss)
            sums += batch_sums
        sums = self.strategy.sum(sums)
        means = dict(zip(names, (sums / weights).tolist(), strict=True))
        total = loss_of(self.objective, means)
        for optimizer, rates in zip(self.optimizers, self._base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        # The loss is the same number on every rank, so all of them agree.
        update = self.strategy.update(
            list(self.parameters.values()), self.optimizers, self.max_grad_norm, sound=math.isfinite(total)
        )
        tokens, targets, squares = counts
        return StepReport(
            total,
            means,
            update.grad_norm,
            update.applied,
            int(tokens),
            float(weights[0]),
            num_targets=int(targets),
            squared_lengths=squares,
        )

    def time_s(self, batch: Batch, bf16: bool, repeats: int = 2) -> float:
        """Seconds of one forward and backward pass in a precision, the best of `repeats` after a first one.

        No parameter moves; the gradients are dropped.
        """
        before, self.bf16 = self.bf16, bf16
        weights = torch.ones(len(self.objective.weights(batch)), dtype=torch.float64)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            self.strategy.backward(self._forward(batch, list(self.objective.weights(batch)), weights)[0])
            times.append(time.perf_counter() - start)
        # A step that is not sound moves nothing and drops the gradients, wherever the strategy keeps them.
        self.strategy.update(list(self.parameters.values()), self.optimizers, None, sound=False)
        self.bf16 = before
        return min(times[1:])

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums and weights of the terms over these batches on this rank, both float64."""
        names = list(self.objective.weights(batches[0]))
        sums, weights = (
            torch.zeros(len(names), dtype=torch.float64),
            torch.zeros(len(names), dtype=torch.float64),
        )
        for batch in batches:
            weights += torch.tensor(list(self.objective.weights(batch).values()), dtype=torch.float64)
            sums += self._forward(batch, names, torch.ones_like(weights))[1]
        return sums, weights

    def _totals(self, batches: Sequence[Batch]) -> tuple[list[str], torch.Tensor, list[float]]:
        """Names and global weights of the terms; tokens, targets and squared document lengths."""
        names = list(self.objective.weights(batches[0]))
        local = torch.zeros(len(names) + 3, dtype=torch.float64)
        for batch in batches:
            lengths = batch.cu_seq_lens.diff().double()
            counts = [batch.num_tokens, batch.num_targets, float(lengths.square().sum())]
            values = [*self.objective.weights(batch).values(), *counts]
            local += torch.tensor(values, dtype=torch.float64)
        totals = self.strategy.sum(local)
        # A step whose rows hold no target at all (possible with tiny batches) has zero loss, not 0/0.
        return names, totals[:-3].clamp(min=1e-30), totals[-3:].tolist()

    def _forward(
        self, batch: Batch, names: Sequence[str], weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(self.bf16, batch.input_ids.device.type):
            terms = self.objective.sums(self.policy, batch)
        parts = [terms[name].float() for name in names]
        scaled = dict(zip(names, (p / w for p, w in zip(parts, weights.tolist(), strict=True)), strict=True))
        loss = torch.stack([scaled[name] for name in names if name not in self.objective.metrics]).sum()
        return loss, torch.stack([part.detach().double().cpu() for part in parts])
