"""Whatever comes when, every answer is what plain PEFT gives alone, and nothing is left behind."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftray.engine.api import Output, Request, Sampling
from ftray.engine.core import StepEngine
from ftray.engine.hf_generate import HFGenerateConfig
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.testing import tiny
from tests.peft_reference import Reference

TARGETS = {"a": ["q_proj", "v_proj"], "b": "all-linear", "c": ["down_proj"], "d": "all-linear"}
RANKS = {"a": 2, "b": 8, "c": 5, "d": 3}
LIVE = "live"
"""A name whose delta is replaced while requests run under it."""
MAX_STEPS = 2000


@dataclass(frozen=True)
class Arrival:
    """A request, when it comes, and when its client leaves."""

    step: int
    delta: str | None
    shared: int
    """Tokens it begins with that others begin with too."""
    own: int
    """Further tokens of its prompt, its own."""
    max_tokens: int
    tenant: str
    priority: int
    n: int
    leaves_after: int | None


@dataclass(frozen=True)
class Schedule:
    """What happens to an engine of given sizes."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    max_loras: int
    max_cpu_loras: int
    prefix_cache: bool
    arrivals: list[Arrival]
    publishes: list[tuple[int, str]]
    """Steps at which `LIVE` becomes another delta."""


@dataclass
class World:
    """The base, its deltas and what plain PEFT says of them."""

    base: Path
    folders: Mapping[str, Path]
    reference: Reference
    digests: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("schedules")
    folders = {
        name: tiny.random_adapter(tiny_base, root / name, r=r, seed=r, target_modules=TARGETS[name])
        for name, r in RANKS.items()
    }
    made = World(tiny_base, folders, Reference(tiny_base, folders))
    engine = TorchEngineConfig(kv_cache_tokens=64).build(str(tiny_base))
    made.digests[""] = engine.info.base_digest
    for name, folder in folders.items():
        engine.load_delta(name, str(folder))
        made.digests[name] = engine.delta_info(name).digest
    return made


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 30),
    delta=st.sampled_from([None, LIVE, *RANKS]),
    shared=st.integers(0, 24),
    own=st.integers(1, 16),
    max_tokens=st.integers(1, 14),
    tenant=st.sampled_from(["red", "green"]),
    priority=st.integers(-1, 1),
    n=st.sampled_from([1, 1, 1, 2]),
    leaves_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
)
schedules = st.builds(
    Schedule,
    num_blocks=st.integers(14, 40),
    block_size=st.sampled_from([4, 8]),
    max_num_seqs=st.integers(1, 6),
    max_batch_tokens=st.integers(6, 48),
    max_loras=st.integers(1, 3),
    max_cpu_loras=st.integers(0, 2),
    prefix_cache=st.booleans(),
    arrivals=st.lists(arrivals, min_size=1, max_size=14),
    publishes=st.lists(st.tuples(st.integers(1, 30), st.sampled_from(list(RANKS))), max_size=4),
)


class Play:
    """Runs one schedule."""

    def __init__(self, world: World, schedule: Schedule, config: type[Any] = TorchEngineConfig) -> None:
        self.world, self.schedule = world, schedule
        sizes: dict[str, Any] = {
            "kv_cache_tokens": schedule.num_blocks * schedule.block_size,
            "max_num_seqs": schedule.max_num_seqs,
            "max_loras": schedule.max_loras,
            "max_cpu_loras": schedule.max_cpu_loras,
        }
        if config is TorchEngineConfig:
            sizes |= {
                "block_size": schedule.block_size,
                "max_batch_tokens": schedule.max_batch_tokens,
                "prefix_cache": schedule.prefix_cache,
            }
        self.engine: StepEngine = config(**sizes).build(str(world.base))
        self.live = "a"
        self.engine.load_delta(LIVE, str(world.folders[self.live]))
        for name, folder in world.folders.items():
            self.engine.register_delta(name, str(folder))
        self.requests: dict[str, tuple[Request, str | None]] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finished: set[tuple[str, int]] = set()
        self.leaving: dict[str, int] = {}

    def run(self) -> None:
        """Play to the end and check every answer."""
        last = max(arrival.step for arrival in self.schedule.arrivals)
        for step in range(MAX_STEPS):
            self.publish(step)
            for number, arrival in enumerate(self.schedule.arrivals):
                if arrival.step == step:
                    self.arrive(f"r{number}", arrival)
            for name in [name for name, when in self.leaving.items() if when == step]:
                self.engine.cancel(name)
                del self.requests[name]
            for output in self.engine.step():
                self.take(output)
            self.check_blocks()
            if step > last and not self.engine.has_work():
                break
        assert not self.engine.has_work(), "it never ended"
        self.check_answers()

    def publish(self, step: int) -> None:
        for when, name in self.schedule.publishes:
            if when == step:
                self.engine.load_delta(LIVE, str(self.world.folders[name]), replace=True)
                self.live = name

    def arrive(self, name: str, arrival: Arrival) -> None:
        own = [(7 * int(name[1:]) + 3 * at) % 250 + 2 for at in range(arrival.own)]
        request = Request(
            id=name,
            prompt_ids=[*range(20, 20 + arrival.shared), *own],
            delta=arrival.delta,
            sampling=Sampling(max_tokens=arrival.max_tokens, ignore_eos=True, n=arrival.n),
            tenant=arrival.tenant,
            priority=arrival.priority,
        )
        self.engine.add(request)
        self.requests[name] = request, self.live if arrival.delta == LIVE else arrival.delta
        if arrival.leaves_after is not None:
            self.leaving[name] = arrival.step + arrival.leaves_after

    def take(self, output: Output) -> None:
        assert output.id in self.requests, "an answer to nobody"
        assert output.error is None
        _, delta = self.requests[output.id]
        assert output.digest == self.world.digests[delta or ""]
        key = output.id, output.index
        assert key not in self.finished
        self.tokens.setdefault(key, []).extend(output.token_ids)
        if output.finish_reason:
            self.finished.add(key)
            if all(
                (output.id, index) in self.finished for index in range(self.requests[output.id][0].sampling.n)
            ):
                self.leaving.pop(output.id, None)

    def check_blocks(self) -> None:
        scheduler = self.engine.scheduler
        held = {block for seq in scheduler.sequences() for block in seq.blocks}
        assert len(held) == scheduler.pool.num_blocks - scheduler.pool.num_free
        for seq in scheduler.sequences():
            own = seq.blocks[seq.num_shared :]
            others = [block for other in scheduler.sequences() if other is not seq for block in other.blocks]
            written = seq.blocks[seq.computed // scheduler.block_size :]
            assert len(set(seq.blocks)) == len(seq.blocks)
            assert not set(written) & set(others), "a block that is still written to has two holders"
            assert set(own) <= held

    def check_answers(self) -> None:
        for name, (request, delta) in self.requests.items():
            for index in range(request.sampling.n):
                tokens = self.tokens[name, index]
                assert len(tokens) == request.sampling.max_tokens
                self.world.reference.check_tokens(list(request.prompt_ids), tokens, delta)
        stats = self.engine.stats()
        assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
        assert stats.slots_used <= self.schedule.max_loras
        assert all(self.engine.delta_info(name).in_flight == 0 for name in self.engine.deltas())


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schedule=schedules)
def test_drawn_schedules_equal_peft(world: World, schedule: Schedule) -> None:
    Play(world, schedule).run()


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schedule=schedules)
def test_drawn_schedules_of_the_plain_engine_equal_peft(world: World, schedule: Schedule) -> None:
    Play(world, schedule, HFGenerateConfig).run()


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedule=schedules)
def test_many_drawn_schedules_equal_peft(world: World, schedule: Schedule) -> None:
    Play(world, schedule).run()


def test_a_tight_pool_preempts_and_all_end_right(world: World) -> None:
    arrivals = [Arrival(0, name, 8, 4, 14, "red", 0, 1, None) for name in (None, LIVE) * 3]
    play = Play(world, Schedule(14, 4, 6, 16, 3, 2, True, arrivals, [(3, "b")]))
    play.run()
    stats = play.engine.stats()
    assert stats.preemptions > 0
    assert stats.recomputed_tokens > 0
    assert stats.cached_tokens > 0
