"""Search policies: pure functions from a finished generation to decisions, carried out by the engine.

A policy has no state. Its random numbers are hashes of (seed, member, generation), so it decides the same in
any order of completion and after any number of killed drivers.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Protocol

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.tune.population import Decision, Member, ranked
from ftray.tune.space import Space, pick


class Policy(Protocol):
    """What decides who trains on, from what, with what."""

    def check(self, space: Space, num_members: int) -> None:
        """Raise `ConfigError` if the policy cannot work on this space."""

    def decide(
        self, members: Sequence[Member], generation: int, space: Space, seed: int, mode: str
    ) -> list[Decision]:
        """Decisions at the end of a generation that is not the last; at most one per member."""


@spec
class PBT:
    """Population-based training with truncation selection (Jaderberg et al., arXiv:1711.09846).

    At the end of each generation the worst members, and all that diverged or crashed, take over weights,
    optimiser state and data position of a random one of the best, and its configuration perturbed.
    """

    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Part of the population that is replaced, and part that it is replaced from."""
    resample_probability: float = Field(default=0.25, ge=0, le=1)
    """Probability of drawing a value anew instead of perturbing it."""
    perturbation_factors: list[Annotated[float, Field(gt=0)]] = Field(default=[0.8, 1.25], min_length=1)
    """What a value is multiplied by; choices move to a neighbour, up for factors above 1."""

    def check(self, space: Space, num_members: int) -> None:
        """Raise `ConfigError` for a population of one or a space that training cannot change."""
        if num_members < 2:
            raise ConfigError("num_members: 1 is no population; pbt takes 2 or more, or use `policy: random`")
        if not space.mutable:
            raise ConfigError(
                f"space: {', '.join(space.distributions)} cannot change in training; add a path below "
                "`optim`, `lr_scheduler` or `train`, or use `policy: random`"
            )

    def decide(
        self, members: Sequence[Member], generation: int, space: Space, seed: int, mode: str
    ) -> list[Decision]:
        """Replace the worst and the dead by perturbed copies of the best."""
        order = ranked(members, mode)
        count = min(max(1, math.ceil(len(members) * self.quantile)), len(order) // 2) if len(order) > 1 else 0
        dead = [member for member in members if not member.alive]
        donors = order[: max(count, 1)]
        if not donors:
            return []
        worst = order[::-1][: max(0, count - len(dead))]
        return [
            self._copy(member, pick(donors, seed, "donor", member.index, generation), generation, space, seed)
            for member in sorted([*dead, *worst], key=lambda member: member.index)
        ]

    def _copy(self, member: Member, donor: Member, generation: int, space: Space, seed: int) -> Decision:
        key = (seed, "explore", member.index, generation)
        config = space.perturb(donor.config, self.perturbation_factors, self.resample_probability, *key)
        assert donor.checkpoint is not None and donor.score is not None
        return Decision(
            member=member.index,
            donor=donor.index,
            checkpoint=donor.checkpoint,
            score=donor.score,
            config=config,
            perturbed=config != donor.config,
            replaced=not member.alive,
        )


@spec
class Random:
    """Members drawn once and trained to the end (Bergstra and Bengio, 2012); a diverged one stays out."""

    def check(self, space: Space, num_members: int) -> None:
        """Any space will do."""

    def decide(
        self, members: Sequence[Member], generation: int, space: Space, seed: int, mode: str
    ) -> list[Decision]:
        """Nothing is decided between generations."""
        return []
