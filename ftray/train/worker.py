"""The main path: recipe -> data -> model -> adapt -> objective -> strategy -> steps -> checkpoint -> delta.

One plain function, run in this process, in a Ray Train worker or in a Tune actor; only `io` differs.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from ftray.config.recipe import Recipe
from ftray.core.errors import TrainError
from ftray.core.fs import write_json
from ftray.core.spec import dump
from ftray.model.build import build_structure, load_weights
from ftray.model.folder import resolve_folder
from ftray.model.policy import Policy
from ftray.model.precision import bf16_is_faster
from ftray.optim.first_order import FirstOrder, StepReport
from ftray.train.checkpoint import Checkpoints, State, run_identity
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


def train(recipe: Recipe, io: IO, *, start_from: Path | None = None, stop_at: int | None = None) -> Result:
    """Train a recipe, or go on with it.

    Args:
        recipe: the run.
        io: its surroundings; the run goes on from the newest checkpoint in `io.run_dir`, if there is one.
        start_from: a committed checkpoint of the same structure (a donor's) to begin with instead of nothing.
        stop_at: end after this optimiser step (a segment of a longer run), with a checkpoint and a delta.

    Raises:
        TrainError: if the loss or the gradient stops being finite and the recipe says to stop.
    """
    strategy, settings = recipe.strategy, recipe.train
    main = strategy.dp_rank == 0
    feed = Feed(
        *io.prepare(recipe),
        strategy,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.per_device_train_batch_size,
        seed=recipe.seed,
    )
    model = build_model(recipe)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = recipe.optim.build(parameters)
    checkpoints = Checkpoints(
        io.run_dir / "checkpoints", run_identity(recipe, feed.digest), settings.save_total_limit
    )
    state, last = State(), checkpoints.newest()
    if begin := last or start_from:
        state = checkpoints.restore(begin, parameters, optimizers, same_run=last is not None)
    state = dataclasses.replace(state, bf16=choose_precision(recipe, model, state))
    engine = FirstOrder(
        Policy(model),
        recipe.objective,
        strategy,
        parameters,
        optimizers,
        bf16=bool(state.bf16),
        max_grad_norm=settings.max_grad_norm,
    )
    if main:
        io.open(recipe, state.step)
    clock = Clock(settings, len(feed.shards), strategy, state)
    record: dict[str, Any] = {}
    progress = clock.progress(state.step)
    while progress < 1 and state.step != stop_at:
        torch.manual_seed(step_seed(recipe.seed, state.step, strategy.dp_rank))
        scale = recipe.lr_scheduler.scale(state.step, progress)
        report = engine.step(feed.batches(state.step), scale)
        if not report.applied and settings.nan_policy == "stop":
            raise TrainError(
                f"step {state.step + 1}: loss {report.loss}, gradient norm {report.grad_norm}: not finite; "
                "lower `optim.learning_rate` or set `train.nan_policy: skip`"
            )
        state = dataclasses.replace(
            state, step=state.step + 1, tokens=state.tokens + report.tokens, elapsed_s=clock.elapsed_s
        )
        progress = clock.progress(state.step)
        record = describe(state, report, recipe.optim.learning_rate * scale, progress, feed)
        if due(state.step, settings.eval_steps) and progress < 1:
            record |= validate(engine, feed)
        if due(state.step, settings.logging_steps) or progress >= 1:
            io.log(record)
        if due(state.step, settings.save_steps) and main:
            checkpoints.commit(state, parameters, optimizers, strategy.dp_size)
        if due(state.step, settings.save_steps):
            strategy.barrier()
            io.committed(checkpoints.folder, record)
    metrics = {"loss": record["loss"]} if record else {}
    metrics |= validate(engine, feed)
    io.log({"step": state.step, "progress": progress, **metrics})
    result = Result(io.run_dir, None, None, metrics, state.step, state.tokens)
    if main:
        last = checkpoints.commit(state, parameters, optimizers, strategy.dp_size)
        delta = save_delta(recipe, model, io.run_dir, feed, metrics, state)
        result = dataclasses.replace(result, checkpoint=last, delta=delta)
        io.close()
        plot_run(io.run_dir)
        write_json(io.run_dir / "result.json", dump(result))
    strategy.barrier()
    return result


def build_model(recipe: Recipe) -> Any:
    """Structure on meta, then the adapter, then the strategy's sharding, then the weights."""
    model: Any = build_structure(recipe.model, seed=recipe.seed)
    recipe.adapt.apply(model, recipe.seed)
    model = recipe.strategy.prepare(model)
    if recipe.model.init == "pretrained":
        load_weights(model, resolve_folder(recipe.model.model_name_or_path))
    return model.train()


def choose_precision(recipe: Recipe, model: Any, state: State) -> bool:
    """The recipe's precision; with `auto`, what the run began with, else what rank 0 times as faster."""
    if recipe.train.bf16 != "auto":
        return recipe.train.bf16
    if state.bf16 is not None:
        return state.bf16
    return bool(recipe.strategy.share(bf16_is_faster(model.config.get_text_config().hidden_size)))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one rank's step (dropout): a pure function, so no generator state is ever saved."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=7).digest(), "big")


def due(step: int, every: int | None) -> bool:
    """True if something that happens every `every` steps happens after this one."""
    return every is not None and step % every == 0


def describe(state: State, report: StepReport, rate: float, progress: float, feed: Feed) -> dict[str, Any]:
    """One step's record."""
    return {
        "step": state.step,
        "loss": report.loss,
        **{f"loss/{name}": value for name, value in report.terms.items() if len(report.terms) > 1},
        "grad_norm": report.grad_norm,
        "learning_rate": rate,
        "skipped": int(not report.applied),
        "epoch": feed.order.epoch(state.step),
        "tokens": state.tokens,
        "tokens_per_s": state.tokens / max(state.elapsed_s, 1e-9),
        "elapsed_s": state.elapsed_s,
        "progress": progress,
    }


def validate(engine: FirstOrder, feed: Feed) -> dict[str, float]:
    """Loss over all validation rows, the same on every rank; empty without them."""
    batches = feed.validation_batches()
    if not batches:
        return {}
    model = engine.policy.model.eval()
    sums, weights = engine.evaluate(batches)
    model.train()
    totals = engine.strategy.sum(torch.cat([sums, weights]))
    half = len(sums)
    return {"eval_loss": float((totals[:half] / totals[half:]).sum())}
