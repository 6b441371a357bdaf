"""Successive halving."""

import math

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.tune.policy import Boundary, Search, Verdict, at_least_two
from ftray.tune.space import Values


@spec
class ASHA:
    """Successive halving over the segments (Jamieson and Talwalkar, 2016; one bracket).

    A rung is the end of a segment. Of those that reach it, the best `1 / reduction_factor` train on. With
    `asynchronous: true` it is the stopping kind of asynchronous halving (Li et al., arXiv:1810.05934, as in Ray
    Tune): a member is compared with those that were there before it, and what is stopped stays so.
    """

    reduction_factor: float = Field(default=3.0, gt=1)
    """Of so many members at a rung one trains on; also the distance of rungs, as a factor."""
    grace_segments: int = Field(default=1, ge=1)
    """Segments before the first rung."""

    def first(self, search: Search) -> list[Values]:
        """One draw for each member."""
        at_least_two(search, "asha")
        if self.grace_segments >= search.num_segments:
            raise ConfigError(
                f"policy.grace_segments: {self.grace_segments} leaves no rung before the end; "
                f"set `num_segments` (now {search.num_segments}) higher"
            )
        return search.first(search.size)

    def rungs(self, num_segments: int) -> list[int]:
        """Segments after which members are stopped."""
        count = math.ceil(math.log(num_segments / self.grace_segments, self.reduction_factor)) + 1
        ends = (round(self.grace_segments * self.reduction_factor**place) for place in range(count))
        return sorted({end for end in ends if end < num_segments})

    def decide(self, boundary: Boundary) -> Verdict:
        """Stop those that arrived at a rung and are not among its best."""
        rungs = self.rungs(boundary.search.num_segments)
        stops = []
        for member in boundary.arrived:
            if not member.alive or member.segment not in rungs:
                continue
            order = [arrival.member for arrival in boundary.results(member.segment)]
            keep = max(1, math.floor(len(order) / self.reduction_factor + 1e-9))
            if member.index not in order[:keep]:
                stops.append(member.index)
        return Verdict(stops=stops)
