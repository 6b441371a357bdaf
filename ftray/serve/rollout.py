"""Which version answers to each name: a new one takes over once every engine has it, and bad ones never do.

Pure decisions: what the registry wants, what engines and HTTP fronts report, and from that what engines are to hold
and fronts are to offer. Engines hold what is wanted, what is live and whatever a front may still send requests for,
so a request that was prepared under the old version is answered by the old version.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ftray.engine.api import EngineStats
from ftray.serve.backend import ServedModel


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an engine replica or an HTTP front says of itself, every second or so."""

    member: str
    """Its name, new with every start."""
    is_engine: bool
    loaded: frozenset[str] = frozenset()
    """Digests an engine holds and has probed."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Digests an engine refuses, and why."""
    delayed: Mapping[str, str] = field(default_factory=dict)
    """Digests an engine will try again, and why it does not hold them yet."""
    stats: EngineStats | None = None
    """Load of an engine."""
    in_use: Sequence[ServedModel] = ()
    """What a front offers, or has requests in flight for."""
    in_flight: int = 0
    """Requests a front is answering."""
    draining: bool = False
    """Whether a front takes no more of them."""


@dataclass
class Rollout:
    """The versions of every served name.

    Args:
        base: the base, which is always served.
        member_s: how long a member that is not heard of still counts.
        clock: seconds, monotonic.
    """

    base: ServedModel
    member_s: float = 10.0
    clock: Callable[[], float] = time.monotonic
    wanted: dict[str, ServedModel] = field(default_factory=dict)
    live: dict[str, ServedModel] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    """Digests no engine is to try again, and why."""
    _members: dict[str, tuple[Report, float]] = field(default_factory=dict)

    def want(self, models: Iterable[ServedModel]) -> None:
        """What the registry says now; names that are not among them are not served any more."""
        self.wanted = {model.id: model for model in models}
        digests = {model.digest for model in self.wanted.values()}
        self.rejected = {digest: why for digest, why in self.rejected.items() if digest in digests}
        self._switch()

    def hear(self, report: Report) -> None:
        """Take a member's report into account."""
        self._members[report.member] = (report, self.clock())
        self._switch()

    def members(self) -> list[Report]:
        """Who is there."""
        now = self.clock()
        self._members = {
            name: (report, at) for name, (report, at) in self._members.items() if now - at <= self.member_s
        }
        return [report for report, _ in self._members.values()]

    def to_hold(self) -> list[ServedModel]:
        """Deltas every engine is to hold, each digest once."""
        used = [model for report in self.members() for model in report.in_use]
        wanted = [model for model in self.wanted.values() if model.digest not in self.rejected]
        found = {model.digest: model for model in [*used, *self.live.values(), *wanted] if not model.is_base}
        return list(found.values())

    def offered(self) -> list[ServedModel]:
        """What fronts are to offer; nothing until an engine is there."""
        engines = [report for report in self.members() if report.is_engine]
        return [self.base, *self.live.values()] if engines or self.live else []

    def pending(self) -> frozenset[str]:
        """Ids whose wanted version is not live."""
        return frozenset(id for id, model in self.wanted.items() if self.live.get(id) != model)

    def delays(self) -> dict[str, str]:
        """Digests that some engine cannot hold for now, and why."""
        return {digest: why for report in self.members() for digest, why in report.delayed.items()}

    def _switch(self) -> None:
        engines = [report for report in self.members() if report.is_engine]
        live_digests = {model.digest for model in self.live.values()}
        for model in self.wanted.values():
            problems = [report.failed[model.digest] for report in engines if model.digest in report.failed]
            if problems and model.digest not in live_digests:
                self.rejected[model.digest] = problems[0]
        ready = frozenset.intersection(*(report.loaded for report in engines)) if engines else frozenset()
        self.live = {
            id: model if model.digest in ready else self.live[id]
            for id, model in self.wanted.items()
            if model.digest in ready or id in self.live
        }
