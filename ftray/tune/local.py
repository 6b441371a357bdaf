"""A search without Ray: its segments one after the other in this process, for a notebook, a test, a benchmark."""

from pathlib import Path

from ftray.config.load import write_resolved
from ftray.config.recipe import Recipe
from ftray.config.tune import TRAIN_FN, TuneConfig
from ftray.core.errors import ConfigError, RunStopped, TuneError
from ftray.core.spec import parse
from ftray.tune.as_searched import in_steps, segment_recipe
from ftray.tune.collect import Collector
from ftray.tune.engine import Engine, OnRecord, Segment
from ftray.tune.result import TuneResult, summarise, write_result
from ftray.tune.segment import Job, Outcome, load_function
from ftray.tune.space import Space


def open_search(
    config: TuneConfig, recipe: Recipe, on_record: OnRecord = lambda record: None
) -> tuple[Engine, Job]:
    """Check a search against its recipe and open its journal.

    Returns:
        The engine, which is the caller's to close, and what all its segments have in common.

    Raises:
        ConfigError: for a space, a metric or a setting that does not fit the recipe.
        TuneError: if the journal is damaged, held by another driver, or belongs to another search.
    """
    config = in_steps(config, recipe)
    plain = segment_recipe(config, recipe)
    Space(config.space, config.constraints, plain).check(parse(Recipe, plain))
    check_metric(config, recipe)
    config.executor.check(config, parse(Recipe, plain))
    load_function(config.train_fn)
    folder = Path(config.output_dir).absolute() / config.name
    engine = Engine(folder, config, plain, on_record)
    try:
        write_resolved(config, folder / "tune.yaml")
        write_resolved(recipe, folder / "recipe.yaml")
    except BaseException:
        engine.close()
        raise
    return engine, Job(str(folder), plain, config.train_fn, config.metric, str(Path.cwd()))


def check_metric(config: TuneConfig, recipe: Recipe) -> None:
    """Refuse a validation metric of a recipe without validation rows, before anything is trained."""
    if config.train_fn == TRAIN_FN and config.metric.startswith("eval_") and not recipe.data.validation:
        raise ConfigError(
            f"metric: {config.metric!r} is never reported; the recipe {config.recipe} has no `data.validation`"
        )


def take(engine: Engine, segment: Segment, outcome: Outcome, num_gpus: float) -> None:
    """Give the engine what came of a segment that held so many GPUs.

    Raises:
        RunStopped: if the segment was asked to end; the journal has it as running, so that a resumption goes on.
        TuneError: for anything else that must end the search.
    """
    if outcome.stopped:
        raise RunStopped(outcome.error, outcome.signum)
    step = _newest_step(engine.journal.path.parent / "segments" / segment.name)
    if outcome.fatal and not (outcome.retry and engine.may_retry(segment, step)):
        raise TuneError(outcome.error)
    if outcome.score is None:
        engine.failed(segment, outcome.error, retry=outcome.retry, step=step)
        return
    engine.finished(
        segment,
        outcome.score,
        outcome.metrics or {},
        outcome.seconds,
        outcome.cpu_s,
        outcome.tokens,
        outcome.seconds * num_gpus,
    )


def _newest_step(folder: Path) -> int:
    """Step of a segment's newest checkpoint; 0: it has none."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def run_local(config: TuneConfig, recipe: Recipe) -> TuneResult:
    """Search, or go on with a search.

    Raises as `open_search`, `TuneError` if every member fails, and `RunStopped` if the process is asked to end.
    """
    engine, job = open_search(config, recipe)
    try:
        seconds, collector = 0.0, Collector(engine, job)
        while group := engine.next_group():
            outcomes = engine.config.executor.run(job, group)
            for segment, outcome in zip(group, outcomes, strict=True):
                take(engine, segment, outcome, engine.config.gpus_per_trial)
                seconds += outcome.seconds
            collector.collect()
        collector.collect()  # what an earlier driver left
        result = summarise(engine.config, Path(job.folder), engine.journal.records, seconds)
    finally:
        engine.config.executor.release()
        engine.close()
    write_result(result, result.folder)
    return result
