"""A population: several runs, each of an adapter of its own, over one frozen base in memory.

A member is a `Run` like any other, with rows, engine, schedule, checkpoints and a delta in its own folder; only the
passes through the model are taken together. A member that fails ends alone. What members were when they ended is
kept until the next begin: whoever goes on from one of their checkpoints copies it in memory.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ftray.adapt.base import TRAINED, Named
from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError, DataError, FtrayError, RunStopped, TrainError
from ftray.data.store import Folder
from ftray.model.build import move_rest
from ftray.optim.first_order import Work, step_together
from ftray.train.agree import agreed
from ftray.train.build import build_model, surely_bf16
from ftray.train.io import IO, Record
from ftray.train.oom import explained
from ftray.train.resident import Resident
from ftray.train.roles import build_policy
from ftray.train.run import Result, Run
from ftray.train.share import check_member, check_rows, check_same
from ftray.train.worker import Trained, after_step, assemble, next_work, open_feed


@dataclasses.dataclass(frozen=True)
class Part:
    """What one member trains at a time; the fields are the arguments of `ftray.train.worker.train`."""

    recipe: Recipe
    io: IO
    start_from: Path | None = None
    stop_at: int | None = None


class Population:
    """A base in memory, and what trained over it last.

    Args:
        recipe: any member's; the base is built by what it shares with the others (`ftray.train.share`).

    Raises:
        ConfigError: if no population can be trained of it.
    """

    def __init__(self, recipe: Recipe) -> None:
        check_member(recipe)
        if recipe.train.bf16 == "auto" and not surely_bf16(recipe):
            raise ConfigError(
                "train.bf16: `auto` is a timing, by which members would differ; set it to true or false"
            )
        self.recipe = recipe
        self._adapt: Named = recipe.adapt
        self._model = build_model(recipe)
        self._adapt.remove(self._model, TRAINED)
        _check_base(self._model)
        self._policy = build_policy(recipe, self._model)
        self._residents: dict[Path, Resident] = {}

    def train(self, parts: Sequence[Part], *, rows_per_pass: int | None = None) -> list[Result | FtrayError]:
        """Train every part, together; returns what came of each, in order.

        The ranks of a group all call it with the same parts. A run goes on from what is in its folder, as any does.

        Args:
            parts: of the members.
            rows_per_pass: most rows of one forward pass: as many micro batches as fit go together, whoever's they
                are, and the others after them. None: one micro batch of each member.

        Raises:
            ConfigError: if a member differs from the others in what they share, or has more rows in a micro batch.
            RunStopped: if the process was asked to end; checkpoints hold every step.
        """
        for part in parts:
            check_same(self.recipe, part.recipe)
            check_rows(part.recipe, rows_per_pass)
        found: dict[int, Result | FtrayError] = {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(explained(self.recipe))
            runs: dict[int, Run] = {}
            for place, part in enumerate(parts):
                self._drop_residents(parts[place:])
                stack.enter_context(contextlib.closing(part.io))
                stack.callback(self._adapt.remove, self._model, _name(place))
                with _alone(place, found):
                    runs[place] = self._begin(place, part, parts[0].io)
                    stack.callback(runs[place].checkpoints.close)
            self._drop_residents()
            parts[0].io.start(self.recipe, self.recipe.strategy.dp_rank)
            _train(runs, found, rows_per_pass, parts[0].io)
            self._keep(runs, found)
        return [found[place] for place in range(len(parts))]

    def _begin(self, place: int, part: Part, lead: IO) -> Run:
        """A member's run, its factors in the model under a name of their own."""
        recipe, name, io = part.recipe, _name(place), _Led(part.io, lead)
        with agreed(recipe.strategy):
            feed = open_feed(recipe, io)
        with agreed(recipe.strategy):
            recipe.adapt.apply(self._model, recipe.seed, name)
            move_rest(self._model, recipe.strategy.device)
            parameters = recipe.adapt.parameters(self._model, name)
            before = self._residents.get(part.start_from) if part.start_from else None
            trained = Trained(self._policy, parameters, name, before)
            return assemble(recipe, io, feed, trained, part.start_from, stop_at=part.stop_at)

    def _drop_residents(self, parts: Sequence[Part] = ()) -> None:
        """Let go of those that none of these parts begins as: whoever does later has the checkpoint."""
        wanted = {part.start_from for part in parts}
        self._residents = {path: held for path, held in self._residents.items() if path in wanted}

    def _keep(self, runs: Mapping[int, Run], found: Mapping[int, Result | FtrayError]) -> None:
        """Hold on to what sound members ended as."""
        for place, run in runs.items():
            if isinstance(found[place], FtrayError):
                continue
            checkpoints, engine = run.checkpoints, run.engine
            path = checkpoints.path(run.state.step)
            self._residents[path] = Resident(
                path, engine.parameters, engine.optimizers, run.state, checkpoints.identity
            )


def _name(place: int) -> str:
    """Of a member's factors in the model."""
    return f"m{place:03}"


def _train(
    runs: Mapping[int, Run], found: dict[int, Result | FtrayError], most_rows: int | None, lead: IO
) -> None:
    """Train every run to its end; what comes of each goes into `found`."""
    progress: dict[int, float] = {}
    for place, run in runs.items():
        with _alone(place, found):
            with agreed(run.recipe.strategy):
                run.start()
            progress[place] = run.progress()
    while active := [place for place in progress if not runs[place].is_over(progress[place])]:
        works = _next_works(runs, active, progress, found)
        reports = step_together(list(works.values()), most_rows) if works else []
        for (place, work), report in zip(works.items(), reports, strict=True):
            with _alone(place, found, _seen_by_all(runs[place])):
                progress[place] = after_step(runs[place], work, report)
        for place in active:
            if place in found:
                del progress[place]
        _heed(runs, list(progress), found, lead)
    for place in progress:
        with _alone(place, found, _seen_by_all(runs[place])):
            found[place] = runs[place].finish()


def _next_works(
    runs: Mapping[int, Run],
    active: Sequence[int],
    progress: Mapping[int, float],
    found: dict[int, Result | FtrayError],
) -> dict[int, Work]:
    """What is to be done in the next step, of the members whose rows every rank has."""
    works: dict[int, Work] = {}
    for place in active:
        with _alone(place, found):
            works[place] = next_work(runs[place], progress[place])
    missing = torch.tensor([float(place not in works) for place in active])
    missing = runs[active[0]].recipe.strategy.sum(missing)
    for place in itertools.compress(active, missing.tolist()):
        works.pop(place, None)
        found.setdefault(place, DataError("another rank of the group has no rows for the step; see its log"))
    return works


@contextlib.contextmanager
def _alone(
    place: int, found: dict[int, Result | FtrayError], seen: type[FtrayError] = FtrayError
) -> Iterator[None]:
    """What is wrong with one member ends that one, if it is an error that all ranks see."""
    try:
        yield
    except RunStopped:
        raise
    except seen as error:
        found[place] = error


def _seen_by_all(run: Run) -> type[FtrayError]:
    """Errors that no rank meets alone amid a step's or the end's collectives, where they can no longer agree.

    They are numbers that are not finite. What one rank alone may meet there (a checkpoint that could not be
    written, a damaged shard of validation) ends the group.
    """
    return TrainError if run.recipe.strategy.dp_size > 1 else FtrayError


def _heed(
    runs: Mapping[int, Run], sound: Sequence[int], found: Mapping[int, Result | FtrayError], lead: IO
) -> None:
    """End all runs here if any rank is asked to. Raises `RunStopped` once each has a checkpoint of this step."""
    if not sound:
        return
    strategy, reason = runs[sound[0]].recipe.strategy, lead.stop_reason()
    if not strategy.sum(torch.tensor([float(reason is not None)])):
        return
    stopped = []
    for place in sound:
        try:
            runs[place].heed()
        except RunStopped as error:
            stopped.append(error)
    if strategy.dp_rank == 0:
        steps = [runs[place].state.step if place in runs else 0 for place in sorted({*runs, *found})]
        lead.stopped(steps, reason or "another rank was asked to end")
    strategy.barrier()
    raise stopped[0]


def _check_base(model: nn.Module) -> None:
    """Refuse a base of which more than adapters trains, or that draws dropout for all rows at once."""
    trained = next((name for name, p in model.named_parameters() if p.requires_grad), None)
    if trained is not None:
        raise ConfigError(
            f"objective: it trains `{trained}` besides the adapter, which members of a population cannot share; "
            "take another objective, or search with `executor: trials`"
        )
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            raise ConfigError(
                f"model: `{name}` of the base has dropout {rate} of its own, one draw for all members; set it to 0 "
                "in the base's config.json, or search with `executor: trials`"
            )


class _Led:
    """The surroundings of a member: a folder of its own, watched over and told to stop with the whole group.

    Args:
        io: the member's.
        lead: the group's.
    """

    def __init__(self, io: IO, lead: IO) -> None:
        self._io, self._lead, self.run_dir = io, lead, io.run_dir

    def prepare(self, recipe: Recipe) -> tuple[Folder, Folder | None]:
        """The member's."""
        return self._io.prepare(recipe)

    def claim(self) -> None:
        """The member's folder."""
        self._io.claim()

    def open(self, recipe: Recipe, from_step: int) -> None:
        """The member's folder."""
        self._io.open(recipe, from_step)

    def start(self, recipe: Recipe, rank: int) -> None:
        """The group has been started."""

    def beat(self, step: int, phase: str = "step") -> None:
        """For the whole group."""
        self._lead.beat(step, phase)

    def stop_reason(self) -> str | None:
        """The group's."""
        return self._lead.stop_reason()

    @property
    def stop_signal(self) -> int | None:
        """The group's."""
        return self._lead.stop_signal

    def stopped(self, steps: Sequence[int], reason: str) -> None:
        """The whole group does; told once for all."""

    def log(self, record: Record) -> None:
        """To the member's trackers."""
        self._io.log(record)

    def committed(self, record: Record) -> None:
        """Whoever follows a group hears of its end."""

    def close(self) -> None:
        """The member's; the group is closed by whoever started it."""
        self._io.close()
