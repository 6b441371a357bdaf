"""Tree-structured Parzen estimator, by optuna."""

import warnings
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ftray.core.spec import spec
from ftray.tune.distribution import Choice, Distribution, Uniform
from ftray.tune.policy import Boundary, Search, Verdict
from ftray.tune.population import Member
from ftray.tune.space import Space, Values, unit

_ASKS = 20


@spec
class TPE:
    """Members asked of optuna's `TPESampler` (Bergstra et al., 2011), each trained to the end.

    Members come in batches; a batch is asked when the one before it is through. With `asynchronous: true` each
    one that ends makes room for the next. The study is built anew from what the members reached and every ask has
    a seed of its own, so there is no sampler state to keep.
    """

    num_startup: int = Field(default=4, ge=1)
    """Members drawn at random before the first is asked for."""
    batch_size: int = Field(default=2, ge=1)
    """Members asked for at once; at least as many as there are slots keeps all of them busy."""
    multivariate: bool = True
    """Model the paths together instead of one by one."""

    def first(self, search: Search) -> list[Values]:
        """The members of the start."""
        return search.first(min(self.num_startup, search.size))

    def decide(self, boundary: Boundary) -> Verdict:
        """Ask for the next members, if there is room for them."""
        search, members = boundary.search, boundary.members
        left = search.size - len(members)
        if search.asynchronous:
            ended = [m for m in boundary.arrived if not m.alive or boundary.is_last(m)]
            count = min(left, len(ended) if len(members) >= self.num_startup else 0)
        else:
            count = min(left, self.batch_size) if boundary.idle else 0
        joins: list[Values] = []
        for _ in range(count):
            joins.append(self.ask(search, members, joins))
        return Verdict(joins=joins)

    def ask(self, search: Search, members: Sequence[Member], asked: Sequence[Values]) -> Values:
        """The configuration of the next member, after those that were just asked for."""
        index = len(members) + len(asked)
        for attempt in range(_ASKS):
            config = self._ask(search, members, asked, int(unit(search.seed, "ask", index, attempt) * 2**31))
            if search.space.allows(config):
                return config
        return search.space.sample(search.seed, index)

    def _ask(self, search: Search, members: Sequence[Member], asked: Sequence[Values], seed: int) -> Values:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=self.multivariate, n_startup_trials=self.num_startup
            )
        study = optuna.create_study(
            direction="minimize" if search.mode == "min" else "maximize", sampler=sampler
        )
        space = search.space
        shapes = {path: _distribution(d) for path, d in space.distributions.items()}
        states = optuna.trial.TrialState
        for member in members:
            state = states.COMPLETE if member.score is not None and member.alive else states.FAIL
            if member.alive and member.segment < search.num_segments:
                state = states.RUNNING
            study.add_trial(_trial(space, shapes, member.config, state, member.score))
        for config in asked:
            study.add_trial(_trial(space, shapes, config, states.RUNNING, None))
        found = study.ask(shapes).params
        return {path: _from_optuna(d, found[path]) for path, d in space.distributions.items()}


def _trial(space: Space, shapes: dict[str, Any], config: Values, state: Any, score: float | None) -> Any:
    import optuna

    params = {path: _to_optuna(d, config[path]) for path, d in space.distributions.items()}
    value = score if state == optuna.trial.TrialState.COMPLETE else None
    return optuna.trial.create_trial(params=params, distributions=shapes, state=state, value=value)


def _distribution(distribution: Distribution) -> Any:
    import optuna

    if isinstance(distribution, Choice):
        # By place, because optuna takes plain values only.
        return optuna.distributions.CategoricalDistribution(list(range(len(distribution.values))))
    assert isinstance(distribution, Uniform)
    if distribution.step:
        return optuna.distributions.IntDistribution(0, distribution.num_steps)
    return optuna.distributions.FloatDistribution(distribution.low, distribution.high, log=distribution.log)


def _to_optuna(distribution: Distribution, value: Any) -> Any:
    if isinstance(distribution, Choice):
        return distribution.values.index(value)
    assert isinstance(distribution, Uniform)
    return round((value - distribution.low) / distribution.step) if distribution.step else value


def _from_optuna(distribution: Distribution, value: Any) -> Any:
    if isinstance(distribution, Choice):
        return distribution.values[value]
    assert isinstance(distribution, Uniform)
    return distribution.nearest(distribution.low + value * distribution.step if distribution.step else value)
