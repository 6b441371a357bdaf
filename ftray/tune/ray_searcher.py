"""A searcher of Ray Tune's, by name, for trials that are whole runs."""

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from ray import tune
from ray.tune.search import SEARCH_ALG_IMPORT, Searcher, create_searcher

from ftray.core.errors import ConfigError, TuneError
from ftray.core.spec import spec
from ftray.tune.distribution import Choice, Distribution, Uniform
from ftray.tune.names import nearest
from ftray.tune.policy import Boundary, Search, Verdict
from ftray.tune.population import Member
from ftray.tune.space import Values

_METRIC = "score"


@spec
class RaySearcher:
    """A searcher of Ray Tune (`optuna`, `hyperopt`, ...) proposes members; each is trained to the end.

    Members come in batches; a batch is asked when the one before it is through. The searcher is built anew each
    time and told the journal from its beginning, so it must repeat itself: give it a seed. Whatever Python package
    it needs is yours to install.
    """

    searcher: str
    """Name of the searcher in `ray.tune.search`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""
    batch_size: int = Field(default=2, ge=1)
    """Members asked for at once."""

    def __post_init__(self) -> None:
        known = sorted(set(SEARCH_ALG_IMPORT) - {"variant_generator", "random"})
        if self.searcher not in known:
            raise ConfigError(
                f"searcher: {self.searcher!r} is none of Ray Tune's; {nearest(self.searcher, known)}"
            )

    def first(self, search: Search) -> list[Values]:
        """The first batch."""
        if search.asynchronous:
            raise ConfigError("asynchronous: a searcher of Ray Tune is asked in batches; leave it out")
        if search.space.constraints:
            raise ConfigError("constraints: a searcher of Ray Tune does not know them; use `policy: tpe`")
        return self._ask(search, [], min(self.batch_size, search.size))

    def decide(self, boundary: Boundary) -> Verdict:
        """The next batch, once the last one is through."""
        left = boundary.search.size - len(boundary.members)
        if not boundary.idle or left <= 0:
            return Verdict()
        return Verdict(joins=self._ask(boundary.search, boundary.members, min(left, self.batch_size)))

    def _ask(self, search: Search, members: Sequence[Member], count: int) -> list[Values]:
        searcher = self._build(search)
        for begin in range(0, len(members), self.batch_size):
            batch = members[begin : begin + self.batch_size]
            asked = self._suggest(searcher, search, begin, len(batch))
            if asked != [member.config for member in batch]:
                raise TuneError(
                    f"policy.searcher: {self.searcher} proposes something else each time, so the search cannot be "
                    "told to it again; give it a seed in `policy.settings`"
                )
            for member in batch:
                failed = member.score is None or not member.alive
                result = None if failed else {_METRIC: member.score, "config": member.config}
                searcher.on_trial_complete(str(member.index), result, error=failed)
        return self._suggest(searcher, search, len(members), count)

    def _build(self, search: Search) -> Searcher:
        shapes = {path: _domain(shape) for path, shape in search.space.distributions.items()}
        logging.getLogger("optuna").setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                searcher: Searcher = create_searcher(self.searcher, **self.settings)
                searcher.set_search_properties(_METRIC, search.mode, shapes)
        except (AssertionError, ImportError, TypeError, ValueError) as error:
            raise ConfigError(f"policy.searcher: {self.searcher}: {' '.join(str(error).split())}") from None
        return searcher

    def _suggest(self, searcher: Searcher, search: Search, begin: int, count: int) -> list[Values]:
        found = []
        for index in range(begin, begin + count):
            proposed = searcher.suggest(str(index))
            if not isinstance(proposed, dict):
                raise TuneError(f"policy.searcher: {self.searcher} proposes nothing; lower `num_members`")
            found.append({path: _value(d, proposed[path]) for path, d in search.space.distributions.items()})
        return found


def _domain(distribution: Distribution) -> Any:
    if isinstance(distribution, Choice):
        return tune.choice(list(range(len(distribution.values))))
    assert isinstance(distribution, Uniform)
    if distribution.step:
        return tune.randint(0, distribution.num_steps + 1)
    return (tune.loguniform if distribution.log else tune.uniform)(distribution.low, distribution.high)


def _value(distribution: Distribution, proposed: Any) -> Any:
    if isinstance(distribution, Choice):
        return distribution.values[int(proposed)]
    assert isinstance(distribution, Uniform)
    if distribution.step:
        return distribution.nearest(distribution.low + int(proposed) * distribution.step)
    return distribution.nearest(float(proposed))
