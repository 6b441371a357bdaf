"""What a policy is: pure functions from what the members have reached to decisions the engine carries out.

A policy has no state. Its random numbers are hashes of (seed, member, segment), so it decides the same in any
order of completion and after any number of killed drivers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from ftray.core.errors import ConfigError
from ftray.tune.population import Arrival, Decision, Member
from ftray.tune.space import Space, Values

NUM_MEMBERS = 4
"""Members of a population whose size nobody named."""


@dataclass(frozen=True)
class Search:
    """What stays the same through a search."""

    space: Space
    num_members: int | None
    """As the user said; None: nothing."""
    num_segments: int
    seed: int
    mode: str
    asynchronous: bool = False

    @property
    def size(self) -> int:
        """Members there are, where the policy does not count them itself."""
        return NUM_MEMBERS if self.num_members is None else self.num_members

    def first(self, count: int) -> list[Values]:
        """Configurations of the first members, spread over the space."""
        return [self.space.sample(self.seed, index) for index in range(count)]


@dataclass(frozen=True)
class Boundary:
    """The end of a generation, or of one member's segment where nobody waits."""

    search: Search
    members: Sequence[Member]
    """All there are."""
    arrived: Sequence[Member]
    """Those to decide about, also those that have just failed."""
    idle: bool
    """Nobody has anything left to train."""

    def is_last(self, member: Member) -> bool:
        """True if the member has finished its last segment: nothing may be perturbed there."""
        return member.segment >= self.search.num_segments

    def results(self, segment: int) -> list[Arrival]:
        """What members have reached after so many segments, best first, as far as it is known."""
        sign = 1.0 if self.search.mode == "min" else -1.0
        found = [member.arrivals[segment - 1] for member in self.members if member.segment >= segment]
        known = [arrival for arrival in found if arrival is not None]
        return sorted(known, key=lambda arrival: (sign * arrival.score, arrival.member))


@dataclass(frozen=True)
class Verdict:
    """What a policy decides at a boundary."""

    decisions: list[Decision] = field(default_factory=list)
    """Members that go on from another's checkpoint; at most one for each."""
    stops: list[int] = field(default_factory=list)
    """Members that end here."""
    joins: list[Values] = field(default_factory=list)
    """Configurations of new members."""

    def as_record(self) -> dict[Literal["decisions", "stops", "joins"], Any]:
        """The part of a journal record that carries it out."""
        plain = {
            "decisions": [asdict(decision) for decision in self.decisions],
            "stops": self.stops,
            "joins": self.joins,
        }
        return {key: value for key, value in plain.items() if value}  # type: ignore[misc]


class Policy(Protocol):
    """What decides who trains on, from what, with what."""

    def first(self, search: Search) -> list[Values]:
        """Configurations of the first members.

        Raises:
            ConfigError: if the policy cannot work on this search.
        """

    def decide(self, boundary: Boundary) -> Verdict:
        """What follows from a boundary."""


def at_least_two(search: Search, name: str) -> None:
    """Raise `ConfigError` for a population of one."""
    if search.size < 2:
        raise ConfigError(
            f"num_members: {search.size} is no population; {name} takes 2 or more, or use `policy: random`"
        )
