"""The state of a search as the fold of its journal: members, what they were trained from, what runs now."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ftray.tune.journal import Record


@dataclass(frozen=True)
class Arrival:
    """What a member was when it had finished a segment."""

    member: int
    checkpoint: str
    score: float
    config: dict[str, Any]
    lineage: list[int]


@dataclass
class Member:
    """One member of the population."""

    index: int
    config: dict[str, Any]
    """Recipe path -> value."""
    segment: int = 0
    """Segments finished."""
    checkpoint: str | None = None
    """Name of the finished segment it goes on from; None: the beginning."""
    score: float | None = None
    """Score of that segment, also of a member that failed after it."""
    alive: bool = True
    """False once it diverged or crashed and nothing took its place."""
    stopped: bool = False
    """True once the policy ended it before its last segment."""
    attempt: int = 0
    """Failed attempts of the present segment."""
    failures: int = 0
    """Those of them by this driver since its newest checkpoint."""
    failed_step: int = 0
    """Step of that checkpoint."""
    lineage: list[int] = field(default_factory=list)
    """The members whose weights it carries, oldest first; it is itself the first."""
    arrivals: list[Arrival | None] = field(default_factory=list)
    """For each finished segment what it had reached by training; None where it failed."""

    def failures_at(self, step: int) -> int:
        """Failed attempts that brought it no further than its newest checkpoint, which is of this step."""
        return 0 if step > self.failed_step else self.failures


@dataclass(frozen=True)
class Decision:
    """A member goes on from a donor's checkpoint with a changed configuration (exploit and explore)."""

    member: int
    donor: int
    checkpoint: str
    score: float
    """The donor's."""
    config: dict[str, Any]
    """What the member is trained with from here on."""
    perturbed: bool
    """Whether the configuration differs from the donor's."""
    replaced: bool
    """Whether the member had diverged or crashed."""
    old_config: dict[str, Any] = field(default_factory=dict)
    """What the member was trained with before."""
    old_score: float | None = None
    """What it had reached with it; None: nothing finite."""


class Population:
    """Members and running segments, changed by records alone: equal records, equal state."""

    def __init__(self) -> None:
        self.opened: Record | None = None
        self.epoch = 0
        self.members: list[Member] = []
        self.running: dict[int, Record] = {}
        """Member -> the record that started its segment."""
        self.begun: set[tuple[int, int]] = set()
        """(member, segment) of every segment that was ever started: the budget that is spent."""

    def apply(self, record: Record) -> None:
        """Take over one record of the journal."""
        kind = record["kind"]
        if kind == "open":
            self.opened = record["search"]
            self._join(record["configs"])
        elif kind == "epoch":
            self.epoch = record["epoch"]
            self.running = {}
            for member in self.members:
                member.failures = 0
        elif kind == "start":
            self.running[record["member"]] = record
            self.begun.add((record["member"], record["segment"]))
        elif kind == "commit":
            self.running.pop(record["member"])
            self._finish(record["member"], record["checkpoint"], record["score"])
        elif kind == "fail":
            self.running.pop(record["member"])
            self._fail(record)
        for decision in record.get("decisions", []):
            self._decide(Decision(**decision))
        for index in record.get("stops", []):
            self.members[index].stopped = True
        self._join(record.get("joins", []))

    def _join(self, configs: Iterable[dict[str, Any]]) -> None:
        for config in configs:
            index = len(self.members)
            self.members.append(Member(index, dict(config), lineage=[index]))

    def _finish(self, index: int, checkpoint: str, score: float) -> None:
        member = self.members[index]
        member.checkpoint, member.score = checkpoint, score
        member.arrivals.append(Arrival(index, checkpoint, score, member.config, member.lineage))
        self._through(member)

    def _fail(self, record: Record) -> None:
        member = self.members[record["member"]]
        step = record.get("step", 0)
        member.attempt += 1
        member.failures, member.failed_step = member.failures_at(step) + 1, step
        if record["final"]:
            member.alive = False
            member.arrivals.append(None)
            self._through(member)

    def _through(self, member: Member) -> None:
        member.segment += 1
        member.attempt = member.failures = member.failed_step = 0

    def _decide(self, decision: Decision) -> None:
        member = self.members[decision.member]
        member.config, member.checkpoint = dict(decision.config), decision.checkpoint
        member.score, member.alive = decision.score, True
        member.lineage = [*self._lineage(decision), member.index]

    def _lineage(self, decision: Decision) -> list[int]:
        arrivals = self.members[decision.donor].arrivals
        return next(found.lineage for found in arrivals if found and found.checkpoint == decision.checkpoint)

    @property
    def alive(self) -> list[Member]:
        """Members that have not failed."""
        return [member for member in self.members if member.alive]

    def unfinished(self, num_segments: int) -> list[Member]:
        """Members that have segments to train."""
        return [member for member in self.alive if not member.stopped and member.segment < num_segments]

    def best(self, mode: str) -> Member | None:
        """The member with the best last score; the lower number wins a tie.

        If all have failed, the one that was best before it did.
        """
        sign = 1.0 if mode == "min" else -1.0
        scored = [(not m.alive, sign * m.score, m.index) for m in self.members if m.score is not None]
        return self.members[min(scored)[-1]] if scored else None

    def referenced(self) -> set[str]:
        """Segments whose checkpoints are still needed: by a member, or by a segment that runs now.

        Also by one that has failed: if all others do, its checkpoint may be the best there is.
        """
        names = {member.checkpoint for member in self.members}
        names |= {start["checkpoint"] for start in self.running.values()}
        names |= {start["name"] for start in self.running.values()}
        return {name for name in names if name is not None}


def replay(records: Iterable[Record]) -> Population:
    """The state after a sequence of records."""
    population = Population()
    for record in records:
        population.apply(record)
    return population
