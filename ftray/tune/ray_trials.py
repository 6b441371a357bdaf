"""A search on Ray Tune: each trial is one segment, run in actors that are kept and used again.

Ray Tune gives resources, actors and their supervision; what is trained next, from what and with what is
decided by `Engine`. Ray's own trial state is never read back: a restarted search replays the journal into a
fresh Tuner.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from ftray.cluster.ray_session import session
from ftray.config.load import load
from ftray.config.recipe import Recipe
from ftray.config.tune import TRAIN_FN, TuneConfig
from ftray.core.errors import TuneError
from ftray.core.spec import parse
from ftray.core.types import Progress, no_progress
from ftray.data.ray_prepare import prepare
from ftray.tune.collect import Collector
from ftray.tune.engine import Engine, OnRecord, Segment
from ftray.tune.halt import Halt
from ftray.tune.local import open_search, take
from ftray.tune.members import JOURNAL
from ftray.tune.plots import plot
from ftray.tune.ray_claims import gpus, resources
from ftray.tune.ray_results import results
from ftray.tune.result import TuneResult, summarise, write_result
from ftray.tune.segment import Job, Outcome
from ftray.tune.stall import StallWatch

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Tune's own snapshots are not read; the warning that they are frequent says nothing here.
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
_ENDLESS = 10**6


def run(
    config: TuneConfig,
    *,
    resume: bool = False,
    on_record: OnRecord = lambda record: None,
    on_prepare: Progress = no_progress,
    callbacks: Sequence[tune.Callback] = (),
) -> TuneResult:
    """Search, and report.

    Args:
        config: the search.
        resume: go on where an earlier driver of the same search was. A finished search is only reported.
        on_record: called with every record of the journal as it is written (those of earlier drivers first);
            `Population.apply` turns them into the state of the members.
        on_prepare: progress of the preparation of rows.
        callbacks: Ray Tune's or your own (`ray.tune.logger.JsonLoggerCallback()`, ...), called by Tune in this
            process. A trial is a segment, or those that a population trains at once; `ftray.tune.ray_results` says
            what it reports of each.

    Returns:
        The winner and what happened, as also written to `tune_result.json` in the search's folder.

    Raises:
        ConfigError: for a space or a setting that does not fit the recipe.
        RunStopped: if this process or a segment was asked to end; `resume` goes on.
        TuneError: if the search exists and `resume` is not set, or all members failed.
    """
    started = time.perf_counter()
    folder = Path(config.output_dir).absolute() / config.name
    if not resume and (folder / JOURNAL).exists():
        raise TuneError(f"{folder}: holds a search already; go on with --resume, or choose another name")
    recipe = load(Recipe, config.recipe, config.overrides)
    engine, job = open_search(config, recipe, on_record)
    try:
        if not engine.done:
            with session(), _environment():
                if config.train_fn == TRAIN_FN:
                    # Once for all members, on the cluster; their own preparation then finds it done.
                    _prepare(recipe, on_prepare)
                _fit(engine, job, callbacks)
        Collector(engine, job).collect()  # what an earlier driver left
        result = summarise(engine.config, folder, engine.journal.records, time.perf_counter() - started)
    finally:
        engine.close()
    write_result(result, folder)
    plot(engine.journal.records, folder / "tune.png", config.metric)
    return result


def _prepare(recipe: Recipe, progress: Progress) -> None:
    prepare(recipe.data, recipe.model.tokenizer, "train", progress)
    if recipe.data.validation:
        prepare(recipe.data, recipe.model.tokenizer, "validation", progress)


def _fit(engine: Engine, job: Job, callbacks: Sequence[tune.Callback]) -> None:
    """Run the segments through Ray Tune until the engine has no more."""
    config = engine.config
    watch = StallWatch(Path(job.folder) / "segments", config.stall_s)
    recipe = parse(Recipe, job.recipe)
    searcher = SegmentSearcher(engine, job, watch, gpus(config, recipe))

    def trial(settings: dict[str, Any]) -> None:
        segments = [Segment(**segment) for segment in settings["segments"]]
        outcomes = config.executor.run(job, segments)
        *others, last = results(segments, outcomes)
        for result in others:
            tune.report(result)
        tune.report(last | {"outcomes": json.dumps([asdict(outcome) for outcome in outcomes])})

    def name(trial: Any) -> str:
        segment = trial.config["segments"][0]
        return f"{segment['name']}-{segment['epoch']}-{segment['attempt']}"

    tuner = tune.Tuner(
        tune.with_resources(trial, resources(config, recipe)),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=config.max_concurrent),
            num_samples=_ENDLESS,
            reuse_actors=True,
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name=f"driver-{engine.population.epoch}",
            storage_path=str(Path(job.folder) / "tune"),
            verbose=0,
            callbacks=[*callbacks, EndStall(searcher)],
        ),
    )
    try:
        with searcher.halt.heard():
            tuner.fit()
    except Exception:
        # What the searcher latched is the cause of whatever Tune made of it.
        if searcher.error is None:
            raise
    if searcher.error is not None:
        raise searcher.error
    if not engine.done:
        raise TuneError(f"{job.folder}: the search was interrupted; go on with --resume")


class SegmentSearcher(Searcher):
    """Hands the engine's groups of segments to Ray Tune as trials and brings their outcomes back."""

    def __init__(self, engine: Engine, job: Job, watch: StallWatch, num_gpus: float = 0.0) -> None:
        super().__init__()
        self.num_gpus = num_gpus
        self.engine = engine
        self.job = job
        self.watch = watch
        self.error: BaseException | None = None
        """Ray Tune swallows what `on_trial_complete` raises, so it is kept and raised by `suggest`."""
        self.halt = Halt(job)
        self._groups: dict[str, list[Segment]] = {}
        self._collector = Collector(engine, job)

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles the searcher for a restore that never happens here."""
        return {}

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        """Nothing of Ray Tune's metric or search space is used."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next segments, None to be asked again later, or the end."""
        self.end_stall()
        if self.halt.asked is not None:
            return None
        if self.engine.done:
            return self.FINISHED
        try:
            group = self.engine.next_group()
        except BaseException as error:
            self.error = error
            raise
        if not group:
            return None
        self.watch.tell()
        self._groups[trial_id] = group
        return {"segments": [asdict(segment) for segment in group]}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take an outcome; a trial without one lost its process, by which member's fault nobody knows."""
        self.watch.tell()
        group = self._groups.pop(trial_id, None)
        if group is None or self.error is not None:
            return
        told, together = "the worker process died", len(group) > 1
        if together:
            remedy = "--resume goes on; if it lacked memory, with a smaller `rows_per_pass`"
            told = f"the process of {len(group)} members died; {remedy}"
        lost = Outcome(error=told, retry=True, fatal=together)
        outcomes = [lost] * len(group)
        if not error and result and "outcomes" in result:
            outcomes = [Outcome(**outcome) for outcome in json.loads(result["outcomes"])]
        try:
            for segment, outcome in zip(group, outcomes, strict=True):
                if outcome.stopped and self.halt.asked is not None:
                    continue  # the others may save too
                take(self.engine, segment, outcome, self.num_gpus)
            self._collector.collect()
        except BaseException as raised:
            self.error = raised

    def end_stall(self) -> None:
        """Raise what must end the search, `TuneError` if nothing has moved for too long."""
        running = [segment.name for group in self._groups.values() for segment in group]
        if self.error is None and self.halt.due(running):
            self.error = self.halt.asked
        if self.error is None and (message := self.watch.stalled(running)) is not None:
            self.error = TuneError(message)
        if self.error is not None:
            raise self.error

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A segment reports once, at its end."""

    def save(self, checkpoint_path: str) -> None:
        """The journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """The journal is the state."""

    def get_state(self) -> dict[str, Any]:
        """The journal is the state."""
        return {}


class EndStall(tune.Callback):
    """Ends a search that stalls or is asked to: Ray Tune goes through its callbacks also when nothing happens."""

    def __init__(self, searcher: SegmentSearcher) -> None:
        self._searcher = searcher

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for signs of progress."""
        del iteration, trials, info
        self._searcher.end_stall()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name in _ENVIRONMENT:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
