"""The main path: recipe -> data -> model -> adapt -> objective -> strategy -> steps -> checkpoint -> delta.

One plain function, run in this process, in a Ray Train worker or in a Tune actor; only `io` differs.
"""

import contextlib
import dataclasses
import hashlib
import uuid
from pathlib import Path

import torch

from ftray.config.recipe import Recipe
from ftray.model.policy import Policy
from ftray.optim.first_order import FirstOrder, StepReport, Work, step_together
from ftray.strategy.base import Parameters
from ftray.train.agree import agreed
from ftray.train.build import build_model, build_optimizers, choose_precision
from ftray.train.checkpoint import Checkpoints, State
from ftray.train.clock import Clock
from ftray.train.feed import Feed
from ftray.train.identity import run_identity
from ftray.train.io import IO
from ftray.train.kind import check_rows, rows_for
from ftray.train.oom import explained
from ftray.train.resident import Resident
from ftray.train.roles import build_policy
from ftray.train.run import Result, Run


def train(
    recipe: Recipe,
    io: IO,
    *,
    start_from: Path | None = None,
    stop_at: int | None = None,
    accept_changed_data: bool = False,
) -> Result:
    """Train a recipe, or go on with it.

    Args:
        recipe: the run.
        io: its surroundings; the run goes on from the newest checkpoint in `io.run_dir`, if there is one.
        start_from: a committed checkpoint of the same structure (a donor's) to begin with instead of nothing.
        stop_at: end after this optimiser step, or with the step that reaches this many tokens in a run limited
            by them (a segment of a longer run), with a checkpoint and a delta.
        accept_changed_data: go on though the rows, the seed or the batch size are not those of the checkpoint.

    Raises:
        TrainError: if the loss or the gradient stops being finite and the recipe says to stop, or a step hangs.
        RunStopped: if it was asked to end early; a checkpoint holds every step it has done.
    """
    if recipe.trainer is not None:
        if start_from is not None or stop_at is not None:
            recipe.require_own_loop("a search")
        result: Result = recipe.trainer.train(recipe, io)
        return result
    with contextlib.closing(io), explained(recipe):
        return _train(recipe, io, start_from, stop_at, accept_changed_data)


def _train(
    recipe: Recipe, io: IO, start_from: Path | None, stop_at: int | None, accept_changed_data: bool
) -> Result:
    """The loop; what it holds can be let go of once it has failed."""
    run = begin(recipe, io, start_from, accept_changed_data, stop_at)
    try:
        run.start()
        progress = run.progress()
        while not run.is_over(progress):
            progress = one_step(run, progress)
            if progress < 1:
                run.heed()
        return run.finish()
    finally:
        run.checkpoints.close()


def one_step(run: Run, progress: float) -> float:
    """One optimiser step, and whatever is due after it; returns the run's new progress."""
    work = next_work(run, progress)
    return after_step(run, work, step_together([work])[0])


def next_work(run: Run, progress: float) -> Work:
    """What a run's engine is to do in its next step."""
    recipe, step = run.recipe, run.state.step
    noise = step_seed(recipe.seed, step, recipe.strategy.dp_rank)
    torch.manual_seed(noise)  # of what the base itself draws
    scale = recipe.lr_scheduler.scale(step, progress)
    run.beat("rows" if recipe.data.stream else "step")  # rows that are being prepared are waited for
    batches = run.feed.batches(step)
    run.beat()
    return Work(run.engine, batches, scale, str(noise))


def after_step(run: Run, work: Work, report: StepReport) -> float:
    """Whatever is due after a step; returns the run's new progress.

    The last step's checkpoint is taken at the end of the run, when its validation loss is known.
    """
    recipe = run.recipe
    if not report.applied and recipe.train.nan_policy != "skip":
        return run.not_finite(report)
    progress = run.advance(report, recipe.optim.learning_rate * work.scale)
    validates = due(run.state.step, recipe.train.eval_steps) and progress < 1
    if validates:
        run.validate()
        progress = run.progress()
    if validates or due(run.state.step, recipe.train.logging_steps) or progress >= 1:
        run.log()
    saves = due(run.state.step, recipe.train.save_steps) or (recipe.train.save_best and run.is_best)
    if saves and not run.is_over(progress):
        run.commit()
    return progress


def begin(
    recipe: Recipe,
    io: IO,
    start_from: Path | None,
    accept_changed_data: bool = False,
    stop_at: int | None = None,
) -> Run:
    """Everything a run needs before its first step, restored from its newest checkpoint or from `start_from`."""
    feed = open_feed(recipe, io)
    model = build_model(recipe)
    trained = Trained(
        build_policy(recipe, model), {name: p for name, p in model.named_parameters() if p.requires_grad}
    )
    return assemble(recipe, io, feed, trained, start_from, accept_changed_data, stop_at)


def open_feed(recipe: Recipe, io: IO) -> Feed:
    """The rows of a run, whose folder is this process's own from here on."""
    strategy, settings = recipe.strategy, recipe.train
    main = strategy.dp_rank == 0
    with agreed(strategy):
        if main:
            io.claim()
    feed = Feed(
        *io.prepare(recipe),
        strategy,
        rows_for(recipe.objective, recipe.data),
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.per_device_train_batch_size,
        seed=recipe.seed,
    )
    check_rows(recipe.objective, feed.manifests)
    if main:
        feed.mark_used(io.run_dir)
    return feed


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model, and what of it a run trains."""

    policy: Policy
    parameters: Parameters
    """By the names they have in a run of its own."""
    adapter: str | None = None
    """The adapter they are, where a model has those of several runs."""
    before: Resident | None = None
    """What they begin with, where that is still in memory."""


def assemble(
    recipe: Recipe,
    io: IO,
    feed: Feed,
    trained: Trained,
    start_from: Path | None,
    accept_changed_data: bool = False,
    stop_at: int | None = None,
) -> Run:
    """A run of what is there already; see `begin`."""
    strategy, settings, parameters = recipe.strategy, recipe.train, trained.parameters
    main = strategy.dp_rank == 0
    optimizers = strategy.attach(trained.policy.model, build_optimizers(recipe, parameters))
    identity = run_identity(recipe, feed.digest)
    life = strategy.share(uuid.uuid4().hex[:8])
    checkpoints = Checkpoints(
        io.run_dir / "checkpoints", identity, settings.save_total_limit, life, settings.save_best
    )
    own: Path | None = strategy.share(checkpoints.newest() if main else None)
    state = State()
    if own is None and trained.before is not None:
        state = trained.before.copy_to(parameters, optimizers, identity)
    elif source := own or start_from:
        state = checkpoints.restore(
            source,
            strategy,
            parameters,
            optimizers,
            same_run=own is not None,
            accept_changed_data=accept_changed_data,
        )
    feed.go_on(state.step, state.position)
    engine = FirstOrder(
        trained.policy,
        recipe.objective,
        strategy,
        parameters,
        optimizers,
        max_grad_norm=settings.max_grad_norm,
        adapter=trained.adapter,
    )
    state = choose_precision(recipe, engine, feed, state)
    if main:
        io.open(recipe, state.step)
    clock = Clock(settings, len(feed.shards), strategy, state)
    return Run(recipe, io, feed, engine, checkpoints, clock, state, stop_at)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one rank's step (dropout): a pure function, so no generator state is ever saved."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=7).digest(), "big")


def due(step: int, every: int | None) -> bool:
    """True if something that happens every `every` steps happens after this one."""
    return every is not None and step % every == 0
