"""How the segments of a search are trained: each by itself, or as a population over one base in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from ftray.config.recipe import Recipe
from ftray.config.tune import TRAIN_FN, TuneConfig
from ftray.core.errors import ConfigError
from ftray.core.fs import digest_json
from ftray.core.spec import spec
from ftray.train.share import check_member, check_rows, check_same, shared_field, shared_settings
from ftray.tune.engine import Segment
from ftray.tune.segment import Job, Outcome, Task, part_of, run_segments
from ftray.tune.space import Space, apply

if TYPE_CHECKING:
    from ftray.train.population import Population


class Executor(Protocol):
    """Takes segments that can be trained at once, and trains them as one piece of work."""

    def check(self, config: TuneConfig, recipe: Recipe) -> None:
        """Refuse a search that cannot be run like this. Raises `ConfigError`, one line."""

    def group_size(self, living: int) -> int:
        """Segments in one piece of work, where so many members have not been stopped."""

    def run(self, job: Job, segments: Sequence[Segment]) -> list[Outcome]:
        """Train one piece of work."""

    def release(self) -> None:
        """Let go of what stays in the process from one piece of work to the next."""


@spec
class Trials:
    """Every segment by itself; `max_concurrent` of them at once."""

    def check(self, config: TuneConfig, recipe: Recipe) -> None:
        """Anything goes."""

    def group_size(self, living: int) -> int:
        """One."""
        del living
        return 1

    def run(self, job: Job, segments: Sequence[Segment]) -> list[Outcome]:
        """In the recipe's own way."""
        return run_segments(job, segments)

    def release(self) -> None:
        """Nothing stays."""


@spec
class Populations:
    """The members as low-rank adapters over one base in memory, their rows in the same passes."""

    num_populations: int = Field(default=1, ge=1)
    """Groups that the members are divided into, each with a base of its own and a trial to itself; with
    `max_concurrent` as high they run side by side. Members of one go on from another's by its checkpoints."""
    rows_per_pass: int | None = Field(default=None, ge=1)
    """Most rows in one forward pass of a population: as many micro batches (`train.per_device_train_batch_size`
    rows each) as fit go together, whichever members they are of, so those that are stopped leave their room to the
    rest; few rows need little memory. null: one micro batch of each member."""

    def check(self, config: TuneConfig, recipe: Recipe) -> None:
        """The base trains not, and nothing that belongs to it is searched."""
        check_member(recipe)
        check_rows(recipe, self.rows_per_pass)
        for path, distribution in Space(config.space).distributions.items():
            if field := shared_field(path):
                raise ConfigError(
                    f"space.{path}: members of a population share `{field}`; leave it out, or search with "
                    "`executor: trials`"
                )
            self._check_values(path, [apply(recipe, {path: value}) for value in distribution.edges()])
        if config.train_fn != TRAIN_FN:
            raise ConfigError(f"train_fn: {config.train_fn} trains one member; leave it out for a population")
        if config.asynchronous:
            raise ConfigError("asynchronous: members of a population step together; leave one of the two out")

    def _check_values(self, path: str, members: Sequence[Recipe]) -> None:
        """Refuse members, each with one value at a path, that cannot be trained together."""
        try:
            for member in members:
                check_member(member)
                check_rows(member, self.rows_per_pass)
                check_same(members[0], member)
        except ConfigError as error:
            raise ConfigError(f"space.{path}: {error}") from None

    def group_size(self, living: int) -> int:
        """An equal part of the members."""
        return max(1, -(-living // self.num_populations))

    def run(self, job: Job, segments: Sequence[Segment]) -> list[Outcome]:
        """Together: in this process, where the base stays for the next segments, or in a worker group."""
        return run_segments(job, segments, self._train)

    def release(self) -> None:
        """The base."""
        _LIVE.clear()

    def _train(self, job: Job, tasks: Sequence[Task]) -> list[Any]:
        del job
        parts = [part_of(task) for task in tasks]
        recipe = tasks[0].recipe
        if not recipe.strategy.in_process:
            from ftray.train.ray_work import train_population_in_group

            return list(train_population_in_group(parts, Path.cwd(), self.rows_per_pass))
        population = _in_memory(recipe)
        try:
            return list(population.train(parts, rows_per_pass=self.rows_per_pass))
        except BaseException:
            _LIVE.clear()  # what it stopped in the middle of is not known
            raise


_LIVE: dict[str, "Population"] = {}
"""The population of this process, by what its members share."""


def _in_memory(recipe: Recipe) -> "Population":
    from ftray.train.population import Population

    key = digest_json(shared_settings(recipe))
    if key not in _LIVE:
        _LIVE.clear()  # first, so that there are never two bases
        _LIVE[key] = Population(recipe)
    return _LIVE[key]
