"""The step engine of every first-order method: accumulate gradients, reduce, clip, step.

The training loop calls `step` and knows nothing of `backward`: forward-only and roll-out engines fit the same
place. Several engines, each of an adapter of its own, may share one model: `step_together` takes their steps in the
same passes over it. Objective, gradients, clipping and optimisers stay each one's own, and a step of one engine is
that of a group of one.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from ftray.data.batch import Batch
from ftray.model.policy import Policy, Together
from ftray.model.precision import autocast
from ftray.objective.base import Objective, loss_of
from ftray.strategy.base import Strategy, Update


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
        adapter: which of the model's adapters trains here; None: the one that its route names.
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
        adapter: str | None = None,
    ) -> None:
        self.policy, self.objective, self.strategy = policy, objective, strategy
        self.parameters, self.optimizers = dict(parameters), list(optimizers)
        self.bf16, self.max_grad_norm, self.adapter = bf16, max_grad_norm, adapter
        self._base_rates = [
            [group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers
        ]

    def step(self, batches: Sequence[Batch], scale: float, noise: str = "") -> StepReport:
        """One optimiser step over this rank's micro batches; the arguments are those of `Work`."""
        return step_together([Work(self, batches, scale, noise)])[0]

    def time_s(self, batch: Batch, bf16: bool, repeats: int = 2) -> float:
        """Seconds of one forward and backward pass in a precision, the best of `repeats` after a first one.

        No parameter moves; the gradients are dropped.
        """
        before, self.bf16 = self.bf16, bf16
        work = Work(self, [batch], 1.0)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            _pass([(work, 0)], [torch.ones(len(work.names), dtype=torch.float64)])
            times.append(time.perf_counter() - start)
        # A step that is not sound moves nothing and drops the gradients, wherever the strategy keeps them.
        self.strategy.update(list(self.parameters.values()), self.optimizers, None, sound=False)
        self.bf16 = before
        return min(times[1:])

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums and weights of the terms over these batches on this rank, both float64."""
        sums, weights = [], []
        for batch in batches:
            work = Work(self, [batch], 1.0)
            weights.append(work.counts()[: len(work.names)])
            with _routed([(work, 0)], [batch.num_tokens]):
                sums.append(work.loss(self.policy, batch, torch.ones_like(weights[-1]))[1])
        return torch.stack(sums).sum(0), torch.stack(weights).sum(0)

    def update(self, scale: float, *, sound: bool) -> Update:
        """Reduce, clip and step by the gradients that are there, at `scale` times the base learning rate."""
        for optimizer, rates in zip(self.optimizers, self._base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        parameters = list(self.parameters.values())
        return self.strategy.update(parameters, self.optimizers, self.max_grad_norm, sound=sound)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one engine is to do in one optimiser step, on this rank."""

    engine: FirstOrder
    batches: Sequence[Batch]
    """The micro batches."""
    scale: float
    """Of the base learning rate."""
    noise: str = ""
    """What the dropout of adapters depends on, besides the layer and the micro batch; empty: on the state of
    PyTorch's generator."""

    @functools.cached_property
    def names(self) -> list[str]:
        """The terms of the objective."""
        return list(self.engine.objective.weights(self.batches[0]))

    def counts(self) -> torch.Tensor:
        """Weight of each term; then tokens, targets and squared document lengths; float64."""
        local = torch.zeros(len(self.names) + 3, dtype=torch.float64)
        for batch in self.batches:
            lengths = batch.cu_seq_lens.diff().double()
            counts = [batch.num_tokens, batch.num_targets, float(lengths.square().sum())]
            values = [*self.engine.objective.weights(batch).values(), *counts]
            local += torch.tensor(values, dtype=torch.float64)
        return local

    def loss(self, policy: Policy, batch: Batch, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A micro batch's share of the loss, to be differentiated, and the sums of its terms, float64.

        Args:
            policy: answers for the batch.
            batch: the micro batch.
            weights: what the terms are divided by: their weights in the whole step, over all ranks.
        """
        objective, names = self.engine.objective, self.names
        with autocast(self.engine.bf16, batch.input_ids.device.type):
            terms = objective.sums(policy, batch)
        parts = [terms[name].float() for name in names]
        scaled = dict(zip(names, (p / w for p, w in zip(parts, weights.tolist(), strict=True)), strict=True))
        loss = torch.stack([scaled[name] for name in names if name not in objective.metrics]).sum()
        return loss, torch.stack([part.detach().double().cpu() for part in parts])


def step_together(works: Sequence[Work], most_rows: int | None = None) -> list[StepReport]:
    """One optimiser step of each of several engines that share a model, a strategy and a precision.

    Args:
        works: of the engines; each rank has equally many micro batches of them, of as many rows.
        most_rows: as many micro batches go through the model in one pass as have no more rows than these, whoever's
            they are; a larger one alone. None: the n-th ones of all of them.
    """
    strategy = works[0].engine.strategy
    local = [work.counts() for work in works]
    totals = strategy.sum(torch.cat(local)).split([len(counts) for counts in local])
    # A step whose rows hold no target at all (possible with tiny batches) has zero loss, not 0/0.
    weights = [total[:-3].clamp(min=1e-30) for total in totals]
    sums = [torch.zeros_like(weight) for weight in weights]
    for pieces in _passes(works, most_rows):
        found = _pass([(works[place], n) for place, n in pieces], [weights[place] for place, _ in pieces])
        for (place, _), part in zip(pieces, found, strict=True):
            sums[place] += part
    # The losses are the same numbers on every rank, so all of them agree.
    sums = list(strategy.sum(torch.cat(sums)).split([len(weight) for weight in weights]))
    return [_update(*of_one) for of_one in zip(works, sums, weights, totals, strict=True)]


def _passes(works: Sequence[Work], most_rows: int | None) -> Iterator[list[tuple[int, int]]]:
    """Whose (place among the works) micro batches of which number go through the model together, pass by pass."""
    most = max(len(work.batches) for work in works)
    places = range(len(works))
    waiting = [(place, n) for n in range(most) for place in places if n < len(works[place].batches)]
    if most_rows is None:
        for _, pieces in itertools.groupby(waiting, lambda piece: piece[1]):
            yield list(pieces)
        return
    taken: list[tuple[int, int]] = []
    rows = 0
    for place, number in waiting:
        more = len(works[place].batches[number].row_ids)
        if taken and rows + more > most_rows:
            yield taken
            taken, rows = [], 0
        taken.append((place, number))
        rows += more
    yield taken


def _pass(pieces: Sequence[tuple[Work, int]], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Forward and backward through micro batches, each by its number; the sums of the terms of each."""
    batches = [work.batches[number] for work, number in pieces]
    engine = pieces[0][0].engine
    policy = engine.policy if len(pieces) == 1 else Together(engine.policy, batches)
    losses, sums = [], []
    # The route stays until the gradients are there: checkpointed layers are computed again.
    with _routed(pieces, [batch.num_tokens for batch in batches]):
        for (work, _), batch, weight in zip(pieces, batches, weights, strict=True):
            loss, found = work.loss(policy, batch, weight)
            losses.append(loss)
            sums.append(found)
        engine.strategy.backward(losses[0] if len(losses) == 1 else torch.stack(losses).sum())
    return sums


@contextlib.contextmanager
def _routed(pieces: Sequence[tuple[Work, int]], lengths: Sequence[int]) -> Iterator[None]:
    """Inside the block the next tokens of each length go through the adapter of the engine they are for."""
    route = getattr(pieces[0][0].engine.policy.model, "ftray_route", None)
    if route is None:
        yield
        return
    names = [work.engine.adapter or route.active for work, _ in pieces]
    noise = [f"{work.noise}:{number}" if work.noise else "" for work, number in pieces]
    ends = list(itertools.accumulate(lengths, initial=0))
    segments = None if len(pieces) == 1 else list(zip(names, ends, ends[1:], strict=False))
    with route.use(names[0], segments, noise):
        yield


def _update(work: Work, sums: torch.Tensor, weights: torch.Tensor, totals: torch.Tensor) -> StepReport:
    means = dict(zip(work.names, (sums / weights).tolist(), strict=True))
    loss = loss_of(work.engine.objective, means)
    update = work.engine.update(work.scale, sound=math.isfinite(loss))
    tokens, targets, squares = totals[-3:].tolist()
    return StepReport(
        loss,
        means,
        update.grad_norm,
        update.applied,
        int(tokens),
        float(weights[0]),
        num_targets=int(targets),
        squared_lengths=squares,
    )
