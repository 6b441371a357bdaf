"""Population-based training."""

import math
import statistics
from typing import Annotated, Literal

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.tune.policy import Boundary, Search, Verdict, at_least_two
from ftray.tune.population import Arrival, Decision, Member
from ftray.tune.space import Values, pick


@spec
class PBT:
    """Population-based training (Jaderberg et al., arXiv:1711.09846).

    At the end of each segment but the last, members that did badly, and all that diverged or crashed, take over
    weights, optimiser state and data position of one that did well, and its configuration perturbed. Whoever is
    compared has trained for equally many steps.
    """

    selection: Literal["truncation", "tournament"] = "truncation"
    """`truncation`: the worst `quantile` copies one of the best `quantile`. `tournament`: each member meets
    another one drawn for it, and copies it if that one did better."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """With `truncation`: part of the population that is replaced, and part that it is replaced from."""
    resample_probability: float = Field(default=0.25, ge=0, le=1)
    """Probability of drawing a value anew instead of perturbing it."""
    perturbation_factors: list[Annotated[float, Field(gt=0)]] = Field(default=[0.8, 1.25], min_length=1)
    """What a value is multiplied by; choices move to a neighbour, up for factors above 1."""
    explosion_factor: float | None = Field(default=4.0, gt=1)
    """With `mode: min`: a score above this many times the median (of 3 or more, if that is above 0) has diverged,
    whatever the quantile; null: only what is not finite has."""

    def first(self, search: Search) -> list[Values]:
        """One draw for each member; refuses a population of one or a space that training cannot change."""
        at_least_two(search, "pbt")
        if not search.space.mutable:
            raise ConfigError(
                f"space: {', '.join(search.space.distributions)} cannot change in training; add a path below "
                "`optim`, `lr_scheduler` or `train`, or use `policy: random`"
            )
        return search.first(search.size)

    def decide(self, boundary: Boundary) -> Verdict:
        """Replace the bad and the dead by perturbed copies of the good."""
        decisions = []
        for member in boundary.arrived:
            if boundary.is_last(member):
                continue
            order = boundary.results(member.segment)
            sound = order[: len(order) - self._num_exploded(order, boundary.search.mode)]
            if not sound or sound == [member.arrivals[-1]]:
                continue
            broken = not member.alive or member.index not in [arrival.member for arrival in sound]
            donor = self._donor(member, sound, broken, boundary)
            if donor is not None:
                decisions.append(self._copy(member, donor, broken, boundary.search))
        return Verdict(decisions=decisions)

    def _donor(
        self, member: Member, sound: list[Arrival], broken: bool, boundary: Boundary
    ) -> Arrival | None:
        """What a member takes over; None if it goes on by itself."""
        key = (boundary.search.seed, "donor", member.index, member.segment)
        if self.selection == "tournament":
            others = [arrival for arrival in sound if arrival.member != member.index]
            rival = pick(others, *key)
            mine = next((place for place, a in enumerate(sound) if a.member == member.index), len(sound))
            return rival if broken or sound.index(rival) < mine else None
        broken_ones = len(self._reached(boundary, member.segment)) - len(sound)
        size = len(sound) + broken_ones
        count = min(max(1, math.ceil(size * self.quantile)), len(sound) // 2) if len(sound) > 1 else 0
        worst = [arrival.member for arrival in sound[len(sound) - max(0, count - broken_ones) :]]
        if not broken and member.index not in worst:
            return None
        chosen: Arrival = pick(sound[: max(count, 1)], *key)
        return chosen

    def _reached(self, boundary: Boundary, segment: int) -> list[Member]:
        """Members that came as far, sound or broken."""
        return [member for member in boundary.members if member.segment >= segment]

    def _num_exploded(self, order: list[Arrival], mode: str) -> int:
        """How many at the end of the ranking count as diverged."""
        if self.explosion_factor is None or mode != "min" or len(order) < 3:
            return 0
        limit = statistics.median(arrival.score for arrival in order) * self.explosion_factor
        return sum(arrival.score > limit for arrival in order) if limit > 0 else 0

    def _copy(self, member: Member, donor: Arrival, broken: bool, search: Search) -> Decision:
        key = (search.seed, "explore", member.index, member.segment)
        config = search.space.perturb(
            donor.config, self.perturbation_factors, self.resample_probability, *key
        )
        return Decision(
            member=member.index,
            donor=donor.member,
            checkpoint=donor.checkpoint,
            score=donor.score,
            config=config,
            perturbed=config != donor.config,
            replaced=broken,
            old_config=member.config,
            old_score=member.score if member.alive else None,
        )
