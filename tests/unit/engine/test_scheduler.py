"""Admission, chunks, order, and blocks that are all back in the end."""

import random

import pytest

from ftray.core.errors import RequestError
from ftray.engine.api import Request, Sampling
from ftray.engine.scheduler import Scheduler


def make(**settings: int) -> Scheduler:
    return Scheduler(
        **{"max_num_seqs": 4, "max_batch_tokens": 16, "num_blocks": 10, "block_size": 4, "max_length": 40}
        | settings
    )


def request(name: str, prompt: int, new: int = 1) -> Request:
    return Request(id=name, prompt_ids=[7] * prompt, sampling=Sampling(max_tokens=new))


def run_step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    rows = scheduler.schedule()
    scheduler.advance(rows)
    for row in rows:
        if row.samples or row.seq.computed == len(row.seq.tokens):
            row.seq.tokens.append(0)
        if row.seq.num_generated >= row.seq.request.sampling.max_tokens:
            scheduler.finish(row.seq)
    return [(row.seq.request.id, row.start, row.length) for row in rows]


def test_long_prompts_are_chunked_and_never_stall_those_that_decode() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("short", 2, 5), 0)
    run_step(scheduler)
    scheduler.add(request("long", 20, 2), 0)
    steps = [run_step(scheduler) for _ in range(3)]
    assert steps == [
        [("short", 2, 1), ("long", 0, 7)],
        [("short", 3, 1), ("long", 7, 7)],
        [("short", 4, 1), ("long", 14, 6)],
    ]


def test_rows_of_one_delta_stand_together() -> None:
    scheduler = make()
    for name, slot in (("a", 2), ("b", 0), ("c", 1), ("d", 2)):
        scheduler.add(request(name, 1), slot)
    assert [row.seq.slot for row in scheduler.schedule()] == [0, 1, 2, 2]


def test_prompts_are_computed_in_order_of_arrival_whatever_their_delta() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("first", 14), 3)
    scheduler.add(request("second", 14), 0)
    assert run_step(scheduler) == [("second", 0, 1), ("first", 0, 7)]
    assert run_step(scheduler) == [("second", 1, 1), ("first", 7, 7)]
    assert run_step(scheduler) == [("second", 2, 8)]


def test_admission_waits_for_blocks_in_order_of_arrival() -> None:
    scheduler = make()
    scheduler.add(request("big", 28, 5))  # 7 of 10 blocks
    scheduler.add(request("bigger", 32, 2))
    scheduler.add(request("small", 1, 1))
    assert [name for name, *_ in run_step(scheduler)] == ["big"]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    assert scheduler.pool.num_free == 3


@pytest.mark.parametrize(
    ("prompt", "new", "word"), [(0, 1, "no token"), (40, 1, "exceed"), (1, 40, "exceed")]
)
def test_what_can_never_run_is_refused(prompt: int, new: int, word: str) -> None:
    with pytest.raises(RequestError, match=word):
        make().add(request("x", prompt, new), 0)


def test_more_than_the_pool_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="kv_cache_tokens"):
        make(num_blocks=2).add(request("x", 10, 10), 0)


def test_an_id_in_use_is_refused() -> None:
    scheduler = make()
    scheduler.add(request("x", 1), 0)
    with pytest.raises(RequestError, match="already"):
        scheduler.add(request("x", 1), 0)


def test_nothing_leaks_under_random_arrivals_and_cancels() -> None:
    rng = random.Random(0)
    scheduler = make()
    names = iter(range(10_000))
    for _ in range(600):
        if rng.random() < 0.6:
            name = str(next(names))
            scheduler.add(request(name, rng.randint(1, 20), rng.randint(1, 20)), rng.randint(0, 3))
        live = scheduler.sequences()
        if live and rng.random() < 0.2:
            scheduler.finish(rng.choice(live))
        rows = scheduler.schedule()
        owned = [block for row in rows for block in row.seq.blocks]
        assert len(owned) == len(set(owned)) == 10 - scheduler.pool.num_free
        assert sum(row.length for row in rows) <= 16
        assert len({row.seq.row for row in rows}) == len(rows) <= 4
        run_step(scheduler)
    while scheduler.sequences():
        run_step(scheduler)
    assert scheduler.pool.num_free == 10
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
