"""A run under way: its parts, where it stands, and what it leaves behind."""

import collections
import contextlib
import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftray.config.recipe import Recipe
from ftray.core.errors import RunStopped, TrainError
from ftray.core.fs import write_json
from ftray.core.spec import dump
from ftray.core.types import finite
from ftray.objective.base import Objective, loss_of
from ftray.optim.ema import averaged
from ftray.optim.first_order import FirstOrder, StepReport
from ftray.train import early
from ftray.train.checkpoint import Checkpoints, State
from ftray.train.clock import Clock
from ftray.train.delta import save_delta
from ftray.train.feed import Feed
from ftray.train.io import IO
from ftray.train.meter import Meter
from ftray.train.plot import plot_run
from ftray.train.profile import Profiler


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
    """Tokens trained on, over all ranks."""
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
    stop_at: int | None = None
    """Optimiser step (of a run limited by tokens: token) at which this part of a longer run ends."""
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Metrics of the last step."""

    def __post_init__(self) -> None:
        self._first_step = self.state.step
        strategy = self.recipe.strategy
        self.meter = Meter(self.engine, strategy)
        self.profiler = Profiler(self.io.run_dir, self.recipe.train.profile_steps, strategy.dp_rank)

    def progress(self) -> float:
        """Fraction of the run that is done; 1 also if validation has not got better for too long."""
        over = early.is_over(self.recipe.train, self.state)
        return 1.0 if over else self.clock.progress(self.state)

    def is_over(self, progress: float) -> bool:
        """True if no step follows here."""
        return progress >= 1 or (self.stop_at is not None and self.clock.done(self.state) >= self.stop_at)

    def published(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the model has the weights that are validated and published."""
        optimizers = self.engine.optimizers if self.recipe.train.publish_ema else ()
        return averaged(self.engine.policy.model, optimizers)

    def start(self) -> None:
        """What is to be done once before the first step of this process."""
        self.io.start(self.recipe, self.recipe.strategy.dp_rank)
        if self.recipe.train.nan_policy == "roll_back" and self.state.step == 0:
            self.commit(wait=True)  # so that there is one to go back to

    def beat(self, phase: str = "step") -> None:
        """Say what comes next; the first step of a process may take longer (it compiles, it fills caches)."""
        if phase == "step" and self.state.step == self._first_step:
            phase = "first step"
        self.io.beat(self.state.step, phase)

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
            eval_loss=None,
        )
        progress = self.clock.progress(self.state)
        terms = _by_name(self.recipe.objective, report.terms)
        self.record = {
            "step": self.state.step,
            "loss": report.loss,
            **terms,
            "grad_norm": report.grad_norm,
            "learning_rate": rate,
            "skipped": int(not report.applied),
            "rollbacks": self.state.rollbacks,
            "epoch": self.feed.order.epoch(self.state.step),
            "tokens": self.state.tokens,
            "tokens_per_s": self.state.tokens / max(elapsed_s, 1e-9),
            "elapsed_s": elapsed_s,
            "progress": progress,
            **self.meter.read(report, progress),
        }
        self.profiler.step()
        return progress

    def log(self) -> None:
        """Write the last step's record."""
        self.io.log(self.record)

    def validate(self) -> dict[str, float]:
        """Loss over all validation rows, the same on every rank; empty without them."""
        batches = self.feed.validation_batches()
        if not batches:
            return {}
        self.beat("validation")
        model = self.engine.policy.model.eval()
        with self.published():
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
        self.state = early.after_validation(self.recipe.train, self.state, metrics["eval_loss"])
        if not math.isfinite(metrics["eval_loss"]) and self.recipe.strategy.dp_rank == 0:
            warnings.warn(
                f"step {self.state.step}: eval_loss is {metrics['eval_loss']}; it is no gain and never the best",
                stacklevel=2,
            )
        return metrics

    @property
    def is_best(self) -> bool:
        """This step was validated, and none before it had a lower loss."""
        return self.state.eval_loss is not None and self.state.eval_loss == self.state.best_eval_loss

    def commit(self, *, wait: bool = False) -> None:
        """Take a checkpoint and tell every rank's surroundings; its files are written beside the next steps."""
        self._save(wait=wait)
        self.io.committed(self.record)

    def _save(self, *, wait: bool) -> None:
        self.beat("checkpoint")
        strategy, engine = self.recipe.strategy, self.engine
        snapshot = strategy.snapshot(engine.parameters, engine.optimizers, copy=not wait)
        self.checkpoints.commit(self.state, snapshot, strategy.dp_size, wait=wait)
        if strategy.dp_rank == 0 and (durable := self.checkpoints.durable) is not None:
            self.feed.drop_before(durable.position)

    def heed(self) -> None:
        """End the run here if any rank is asked to end it; all of them agree after each step.

        Raises:
            RunStopped: after a checkpoint of this step is committed.
        """
        strategy, reason = self.recipe.strategy, self.io.stop_reason()
        if not strategy.sum(torch.tensor([float(reason is not None)])):
            return
        self._save(wait=True)
        step, reason = self.state.step, reason or "another rank was asked to end"
        if strategy.dp_rank == 0:
            self.io.stopped([step], reason)
        strategy.barrier()
        raise RunStopped(stopped_after(self.recipe.name, step, reason), self.io.stop_signal)

    def not_finite(self, report: StepReport) -> float:
        """After a step that moved nothing: stop, or go back and on, as the recipe says; returns the progress.

        All ranks see the same numbers and come here together. Going back means the newest committed checkpoint
        and then the rows *after* the bad ones: parameters that led to numbers that are not finite would do so
        again on the same rows (Chowdhery et al., arXiv:2204.02311, section 5.1).
        """
        state, settings = self.state, self.recipe.train
        what = f"step {state.step + 1}: loss {report.loss}, gradient norm {report.grad_norm}: not finite"
        if settings.nan_policy == "stop":
            raise TrainError(
                f"{what}; lower `optim.learning_rate` or set `train.nan_policy` to `skip` or `roll_back`"
            )
        if state.rollbacks == settings.max_rollbacks:
            raise TrainError(
                f"{what}, after {state.rollbacks} returns to a checkpoint; lower `optim.learning_rate`, mend the "
                "rows, or raise `train.max_rollbacks`"
            )
        strategy, engine = self.recipe.strategy, self.engine
        self.beat("checkpoint")
        self.checkpoints.finish()
        strategy.barrier()
        newest: Path | None = strategy.share(self.checkpoints.newest() if strategy.dp_rank == 0 else None)
        if newest is None:
            raise TrainError(f"{what}; there is no checkpoint to go back to")
        for optimizer in engine.optimizers:
            optimizer.state.clear()
        then = self.checkpoints.restore(
            newest, strategy, engine.parameters, engine.optimizers, same_run=True, accept_changed_data=True
        )
        position = self.feed.order.position(state.step + 1)
        # Tokens of updates that were undone are not trained on.
        self.state = dataclasses.replace(then, position=position, rollbacks=state.rollbacks + 1)
        self.feed.go_on(then.step, position)
        if strategy.dp_rank == 0:
            self.io.open(self.recipe, then.step)
        return self.clock.progress(self.state)

    def finish(self) -> Result:
        """Validate, commit the last checkpoint, save the delta and, of a whole run, the picture."""
        state, run_dir = self.state, self.io.run_dir
        metrics = {} if state.loss is None else {"loss": state.loss}
        metrics |= self.validate()
        progress = self.clock.progress(state)
        self.io.log({"step": state.step, "progress": progress, **metrics, "final": True})
        self.commit(wait=True)
        self.beat("end")
        checkpoint = delta = None
        trained = self.recipe.strategy.full_parameters(self.engine.parameters)
        with self.published():
            if self.recipe.strategy.dp_rank == 0:
                checkpoint = self.checkpoints.path(state.step)
                model = self.engine.policy.model
                delta = save_delta(
                    self.recipe, model, trained, run_dir, self.feed, metrics, state, self.engine.adapter
                )
                if self.stop_at is None:  # a part of a longer run is drawn with the whole of it
                    plot_run(run_dir)
            collections.deque(trained, maxlen=0)  # every rank takes part in gathering what rank 0 saves
        self.profiler.close()
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


def stopped_after(name: str, step: int, reason: str) -> str:
    """What a run says that was asked to end."""
    return f"{name}: stopped after step {step} ({reason}); a checkpoint holds it, `--resume` goes on"


def _by_name(objective: Objective, means: Mapping[str, float]) -> dict[str, float]:
    """What is logged besides the loss: its terms where there are several, and the objective's metrics."""
    terms = {name: mean for name, mean in means.items() if name not in objective.metrics}
    several = {f"loss/{name}": mean for name, mean in terms.items()} if len(terms) > 1 else {}
    return several | {name: means[name] for name in objective.metrics}
