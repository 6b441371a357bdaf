"""The engine of a search: hands out segments, takes results, journals every decision. No Ray, no torch.

A segment is: train member m from checkpoint c with configuration h until step n. Whoever runs segments asks
`next_segment()`, and answers with `finished()` or `failed()`. Generations are synchronous: the decision falls
when the last member of a generation is through, inside the very record that says so. In an asynchronous search
it falls for each member in the record that ends its segment.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftray.config.tune import TuneConfig
from ftray.core.errors import TuneError
from ftray.core.fs import digest_json
from ftray.core.spec import dump
from ftray.tune.journal import Journal, Record
from ftray.tune.policy import Boundary, Search
from ftray.tune.population import Member, Population
from ftray.tune.space import Space

NOT_IDENTITY = (
    "name",
    "output_dir",
    "recipe",
    "max_concurrent",
    "cpus_per_trial",
    "gpus_per_trial",
    "resources_per_trial",
    "stall_s",
)
"""Settings that may change between a search and its resumption."""

OnRecord = Callable[[Record], None]


@dataclass(frozen=True)
class Segment:
    """One unit of work: plain data, safe to send anywhere."""

    name: str
    """Its folder; a hash of all that determines its result."""
    member: int
    segment: int
    epoch: int
    """The driver that asked for it."""
    attempt: int
    checkpoint: str | None
    """Name of the segment whose checkpoint it starts from."""
    config: dict[str, Any]
    stop_at: int
    """Optimiser step at which it ends; tokens if the search counts segments in them."""


class Engine:
    """A search, opened for writing.

    Args:
        folder: where the journal is.
        config: the search.
        recipe: the resolved recipe as plain data; part of the search's identity.
        on_record: called with every record, those of earlier drivers first.

    Raises:
        TuneError: if the journal belongs to another search, is damaged or is held by another driver.
    """

    def __init__(
        self,
        folder: Path,
        config: TuneConfig,
        recipe: dict[str, Any],
        on_record: OnRecord = lambda record: None,
    ) -> None:
        self.config = config
        self.search = search_of(config, recipe)
        first = config.policy.first(self.search)
        self.journal = Journal(folder / "journal.jsonl")
        self.population = Population()
        self._on_record = on_record
        try:
            self._open({"format": 1, "recipe": recipe, **_identity(config)}, first)
        except BaseException:
            self.journal.close()
            raise

    def _open(self, search: dict[str, Any], configs: list[dict[str, Any]]) -> None:
        for record in self.journal.records:
            self._take(record)
        if self.population.opened is None:
            self._append({"kind": "open", "search": search, "configs": configs})
        assert self.population.opened is not None
        changed = [key for key in search if self.population.opened.get(key) != search[key]]
        if changed:
            raise TuneError(
                f"{self.journal.path}: begun with another `{changed[0]}`; put it back or choose another name"
            )
        # Results that belong to an older driver's epoch are ignored from here on.
        self._append({"kind": "epoch", "epoch": self.population.epoch + 1})

    @property
    def done(self) -> bool:
        """True when every living member has finished its last segment, or the whole budget is spent."""
        if not self.population.alive or self.population.running:
            return False
        return not any(map(self._affordable, self.population.unfinished(self.config.num_segments)))

    def next_segment(self) -> Segment | None:
        """The next segment to start, journaled as started; None if all that can run now is running.

        Raises:
            TuneError: if every member has failed.
        """
        if not self.population.alive:
            reason = next(r["reason"] for r in reversed(self.journal.records) if r["kind"] == "fail")
            told = f"{self.journal.path}: every member has failed; the last one said: {reason}"
            best = self.population.best(self.config.mode)
            raise TuneError(told if best is None else f"{told}; `ftray tune report` has the best before that")
        unfinished = self.population.unfinished(self.config.num_segments)
        generation = min((member.segment for member in unfinished), default=0)
        for member in sorted(unfinished, key=lambda member: (member.segment, member.index)):
            due = member.segment == generation or self.config.asynchronous
            if due and member.index not in self.population.running and self._affordable(member):
                segment = self._segment(member)
                self._append({"kind": "start", **asdict(segment)})
                return segment
        return None

    def next_group(self) -> list[Segment]:
        """The next segments to start as one piece of work, as many as the executor takes; none if none can run.

        Raises:
            TuneError: if every member has failed.
        """
        living = sum(not member.stopped for member in self.population.alive)
        group: list[Segment] = []
        while len(group) < self.config.executor.group_size(living):
            segment = self.next_segment()
            if segment is None:
                break
            group.append(segment)
        return group

    def _affordable(self, member: Member) -> bool:
        """True unless the segments of the whole population are spent; one that was begun may be ended."""
        return not self._spent(self.population) or (member.index, member.segment) in self.population.begun

    def _spent(self, population: Population) -> bool:
        """True if no further segment may be begun, so that nothing would come of a decision."""
        limit = self.config.max_segments
        return limit is not None and len(population.begun) >= limit

    def finished(
        self,
        segment: Segment,
        score: float,
        metrics: dict[str, float],
        seconds: float,
        cpu_s: float = 0.0,
        tokens: int = 0,
        gpu_s: float = 0.0,
    ) -> None:
        """Take a segment's result and what it took; a stale one is ignored.

        A score that is not finite is a divergence.
        """
        if self._stale(segment):
            return
        times = {"seconds": seconds, "cpu_s": cpu_s, "gpu_s": gpu_s}
        cost = {key: round(value, 3) for key, value in times.items()} | {"tokens": tokens}
        if not math.isfinite(score):
            self._fail(segment, f"{self.config.metric} is {score}", final=True, **cost)
            return
        self._append_with_decisions(
            {
                "kind": "commit",
                "member": segment.member,
                "segment": segment.segment,
                "checkpoint": segment.name,
                "config": segment.config,
                "score": score,
                "metrics": {key: value for key, value in metrics.items() if math.isfinite(value)},
                **cost,
            }
        )

    def failed(self, segment: Segment, reason: str, *, retry: bool, step: int = 0) -> None:
        """Take a segment's failure; without `retry`, or where `may_retry` denies it, its member is out."""
        if not self._stale(segment):
            self._fail(segment, reason, final=not (retry and self.may_retry(segment, step)), step=step)

    def may_retry(self, segment: Segment, step: int) -> bool:
        """False after `max_failures` without a checkpoint newer than this one, of the segment's last step."""
        return self.population.members[segment.member].failures_at(step) < self.config.max_failures

    def disposable(self, names: list[str]) -> list[str]:
        """Which of these segments' checkpoints may be deleted: those that nothing refers to any more.

        Also a segment that is about to be run again after a crash counts as referred to.
        """
        keep = self.population.referenced()
        keep |= {self._segment(member).name for member in self.population.alive}
        if self.config.asynchronous:
            keep |= self._donors_to_come()
        return [name for name in names if name not in keep]

    def _donors_to_come(self) -> set[str]:
        """Where nobody waits, those behind copy what those in front of them were at the same step."""
        unfinished = self.population.unfinished(self.config.num_segments)
        slowest = min((member.segment for member in unfinished), default=self.config.num_segments)
        arrivals = [arrival for member in self.population.members for arrival in member.arrivals[slowest:]]
        return {arrival.checkpoint for arrival in arrivals if arrival is not None}

    def close(self) -> None:
        """Give the journal back."""
        self.journal.close()

    def _segment(self, member: Member) -> Segment:
        stop_at = (member.segment + 1) * self.config.segment_length
        identity = [member.checkpoint, member.config, member.index, member.segment, stop_at]
        digest = digest_json(identity).removeprefix("xxh3:")[:12]
        return Segment(
            name=f"m{member.index:03}-s{member.segment:03}-{digest}",
            member=member.index,
            segment=member.segment,
            epoch=self.population.epoch,
            attempt=member.attempt,
            checkpoint=member.checkpoint,
            config=dict(member.config),
            stop_at=stop_at,
        )

    def _stale(self, segment: Segment) -> bool:
        running = self.population.running.get(segment.member)
        return running is None or any(
            running[key] != getattr(segment, key) for key in ("epoch", "segment", "attempt", "name")
        )

    def _fail(self, segment: Segment, reason: str, *, final: bool, **told: float) -> None:
        record = {
            "kind": "fail",
            "member": segment.member,
            "segment": segment.segment,
            "config": segment.config,
        }
        self._append_with_decisions({**record, **told, "reason": reason, "final": final})

    def _append_with_decisions(self, record: Record) -> None:
        """Append a record together with what it brings about, if it closes a generation."""
        after = copy.deepcopy(self.population)
        after.apply(record)
        member = after.members[record["member"]]
        unfinished = after.unfinished(self.config.num_segments)
        through = member.segment > self.population.members[member.index].segment
        if self.config.asynchronous:
            # Also those that failed when nobody was there yet to take over from.
            arrived = [
                m for m in after.members if m is member or (not m.alive and m.segment <= member.segment)
            ]
        else:
            arrived = [m for m in after.members if m.segment == member.segment and not m.stopped]
            through = through and all(other.segment >= member.segment for other in unfinished)
        if through and not self._spent(after):
            boundary = Boundary(self.search, after.members, arrived, idle=not unfinished)
            record = {**record, **self.config.policy.decide(boundary).as_record()}
        self._append(record)

    def _append(self, record: Record) -> None:
        record = {**record, "time": round(time.time(), 3)}
        self.journal.append(record)
        self._take(record)

    def _take(self, record: Record) -> None:
        self.population.apply(record)
        self._on_record(record)


def search_of(config: TuneConfig, recipe: dict[str, Any]) -> Search:
    """What a policy is told about a search; see `Engine` for the arguments and what is raised."""
    return Search(
        Space(config.space, config.constraints, recipe),
        config.num_members,
        config.num_segments,
        config.seed,
        config.mode,
        config.asynchronous,
    )


def _identity(config: TuneConfig) -> dict[str, Any]:
    plain = {key: value for key, value in dump(config).items() if key not in NOT_IDENTITY}
    # How members are divided and passed changes their results by rounding, and what a machine holds depends on it.
    plain["executor"] = {"type": plain["executor"]["type"]}
    return dict(json.loads(json.dumps(plain)))
