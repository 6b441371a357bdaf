"""A run under way: its parts, where it stands, and what it leaves behind."""

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftray.config.recipe import Recipe
from ftray.core.fs import write_json
from ftray.core.spec import dump
from ftray.core.types import finite
from ftray.objective.base import Objective, loss_of
from ftray.optim.first_order import FirstOrder, StepReport
from ftray.train.checkpoint import Checkpoints, State
from ftray.train.clock import Clock
from ftray.train.delta import save_delta
from ftray.train.feed import Feed
from ftray.train.io import IO
from ftray.train.plot import plot_run


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run left behind."""

    run_dir: Path
    checkpoint: Path | None
    """Newest committed checkpoint."""
    delta: Path | None
    """Folder of the trained delta."""
    metrics: dict[str, float]
    """Last `loss`, and `eval_loss` where there are validation rows."""
    step: int
    """Optimiser steps done."""
    tokens: int
    """Tokens seen over all ranks."""
    bf16: bool
    """Computed in bfloat16."""
    rows: dict[str, Any]
    """What became of the training rows: the counts of their manifest."""


@dataclasses.dataclass
class Run:
    """The parts of a run. Only `state` and `record` change."""

    recipe: Recipe
    io: IO
    feed: Feed
    engine: FirstOrder
    checkpoints: Checkpoints
    clock: Clock
    state: State
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Metrics of the last step."""

    def advance(self, report: StepReport, rate: float) -> float:
        """Count one optimiser step; returns the run's progress."""
        state, elapsed_s = self.state, self.clock.elapsed_s
        self.state = dataclasses.replace(
            state,
            step=state.step + 1,
            position=self.feed.order.position(state.step + 1),
            tokens=state.tokens + report.tokens,
            elapsed_s=elapsed_s,
            loss=report.loss,
        )
        progress = self.clock.progress(self.state.step)
        terms = _by_name(self.recipe.objective, report.terms)
        self.record = {
            "step": self.state.step,
            "loss": report.loss,
            **terms,
            "grad_norm": report.grad_norm,
            "learning_rate": rate,
            "skipped": int(not report.applied),
            "epoch": self.feed.order.epoch(self.state.step),
            "tokens": self.state.tokens,
            "tokens_per_s": self.state.tokens / max(elapsed_s, 1e-9),
            "elapsed_s": elapsed_s,
            "progress": progress,
        }
        return progress

    def log(self) -> None:
        """Write the last step's record."""
        self.io.log(self.record)

    def validate(self) -> dict[str, float]:
        """Loss over all validation rows, the same on every rank; empty without them."""
        batches = self.feed.validation_batches()
        if not batches:
            return {}
        model = self.engine.policy.model.eval()
        sums, weights = self.engine.evaluate(batches)
        model.train()
        objective = self.recipe.objective
        totals = self.recipe.strategy.sum(torch.cat([sums, weights]))
        half = len(sums)
        means = dict(
            zip(objective.weights(batches[0]), (totals[:half] / totals[half:]).tolist(), strict=True)
        )
        named = {f"eval_{name}": value for name, value in _by_name(objective, means).items()}
        metrics = {"eval_loss": loss_of(objective, means), **named}
        self.record |= metrics
        return metrics

    def commit(self, *, wait: bool = False) -> None:
        """Take a checkpoint and tell every rank's surroundings; its files are written beside the next steps."""
        strategy, engine = self.recipe.strategy, self.engine
        snapshot = strategy.snapshot(engine.parameters, engine.optimizers, copy=not wait)
        self.checkpoints.commit(self.state, snapshot, strategy.dp_size, wait=wait)
        if strategy.dp_rank == 0 and (durable := self.checkpoints.durable) is not None:
            self.feed.drop_before(durable.position)
        self.io.committed(self.record)

    def finish(self) -> Result:
        """Validate, commit the last checkpoint, save the delta and the picture."""
        state, run_dir = self.state, self.io.run_dir
        metrics = {} if state.loss is None else {"loss": state.loss}
        metrics |= self.validate()
        progress = self.clock.progress(state.step)
        self.io.log({"step": state.step, "progress": progress, **metrics, "final": True})
        self.commit(wait=True)
        checkpoint = delta = None
        trained = self.recipe.strategy.full_parameters(self.engine.parameters)
        if self.recipe.strategy.dp_rank == 0:
            checkpoint = self.checkpoints.path(state.step)
            delta = save_delta(
                self.recipe, self.engine.policy.model, trained, run_dir, self.feed, metrics, state
            )
            plot_run(run_dir)
        collections.deque(trained, maxlen=0)  # every rank takes part in gathering what rank 0 saves
        result = Result(
            run_dir,
            checkpoint,
            delta,
            metrics,
            state.step,
            state.tokens,
            bool(state.bf16),
            self.feed.counts,
        )
        if self.recipe.strategy.dp_rank == 0:
            write_json(run_dir / "result.json", finite(dump(result)))
        self.recipe.strategy.barrier()
        return result


def _by_name(objective: Objective, means: Mapping[str, float]) -> dict[str, float]:
    """What is logged besides the loss: its terms where there are several, and the objective's metrics."""
    terms = {name: mean for name, mean in means.items() if name not in objective.metrics}
    several = {f"loss/{name}": mean for name, mean in terms.items()} if len(terms) > 1 else {}
    return several | {name: means[name] for name in objective.metrics}
