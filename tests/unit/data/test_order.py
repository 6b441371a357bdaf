"""The data order: a bijection per epoch, and the same at every number of workers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.order import BATCH, RANKS, ROWS, WINDOW, build, check, check_mixture, check_windows, measure
from ftray.config.recipe import DataConfig
from ftray.data.arrange import arrange, grown
from ftray.data.mixture import Ints, Mixture
from ftray.data.order import PADDING, Order, Permutation, dp_slice


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, seed, epoch)(np.arange(n))), np.arange(n))


def test_permutation_scatters() -> None:
    n = 20_000
    order = Permutation(n, seed=3, epoch=0)(np.arange(n))
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
    assert (np.diff(order) == 1).sum() < 10
    other = Permutation(n, seed=3, epoch=1)(np.arange(n))
    assert (order == other).sum() < 10


def test_permutation_of_a_billion_needs_no_list() -> None:
    rows = Permutation(10**9, seed=1, epoch=0)(np.arange(5_000) + 999_990_000)
    assert len(np.unique(rows)) == 5_000
    assert rows.min() >= 0 and rows.max() < 10**9


def test_the_order_is_pinned() -> None:
    """A changed order would make every stored cursor point at other rows."""
    assert Order(10, 4, seed=0).batch(0).tolist() == [1, 2, 0, 8]


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_batches_run_through_epochs_without_loss(rows: int, batch: int, seed: int) -> None:
    order = Order(rows, batch, seed)
    steps = -(-3 * rows // batch)
    seen = np.concatenate([order.batch(k) for k in range(steps)])
    for epoch in range(3):
        part = seen[epoch * rows : (epoch + 1) * rows]
        assert np.array_equal(np.sort(part), np.arange(rows))
    assert order.epoch(steps) == pytest.approx(steps * batch / rows)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("batch", [16, 24, 5])
def test_the_global_order_is_the_same_at_every_dp_size(dp_size: int, batch: int) -> None:
    order = Order(101, batch, seed=7)
    for k in range(30):
        whole = order.batch(k)
        parts = [dp_slice(whole, rank, dp_size) for rank in range(dp_size)]
        assert len({len(part) for part in parts}) == 1
        joined = np.concatenate(parts)
        assert np.array_equal(joined[joined != PADDING], whole)


def test_a_change_of_dp_size_in_mid_epoch_loses_and_repeats_nothing() -> None:
    order = Order(97, 12, seed=5)
    world = [1] * 9 + [8] * 7 + [3] * 11 + [2] * 20
    seen = []
    for k, dp_size in enumerate(world):
        for rank in range(dp_size):
            part = dp_slice(order.batch(k), rank, dp_size)
            seen.append(part[part != PADDING])
    flat = np.concatenate(seen)
    for epoch in range(len(flat) // 97):
        assert np.array_equal(np.sort(flat[epoch * 97 : (epoch + 1) * 97]), np.arange(97))


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(ValueError, match="needs rows"):
        Order(0, 4, seed=0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_windows_come_in_order_and_are_shuffled_inside(windows: list[int], batch: int, seed: int) -> None:
    rows = sum(windows)
    order = Order(rows, batch, seed, tuple(windows))
    steps = -(-2 * rows // batch)
    seen = np.concatenate([order.batch(k) for k in range(steps)])[: 2 * rows]
    ends = np.cumsum(windows)
    for epoch in np.split(seen, 2):
        for begin, end in zip(ends - windows, ends, strict=True):
            assert np.array_equal(np.sort(epoch[begin:end]), np.arange(begin, end))


def test_one_window_is_the_order_without_windows() -> None:
    plain, windowed = Order(1000, 16, seed=4), Order(1000, 16, seed=4, windows=(1000,))
    assert all(np.array_equal(plain.batch(k), windowed.batch(k)) for k in range(100))


def test_a_window_s_rows_do_not_depend_on_what_follows() -> None:
    """What is trained while the rest is prepared is what would be trained if all were there."""
    whole, begun = Order(90, 7, 3, windows=(40, 30, 20)), Order(70, 7, 3, windows=(40, 30))
    assert all(np.array_equal(whole.batch(k), begun.batch(k)) for k in range(10))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_an_order_that_grows_is_that_of_the_whole(rows: list[int], window_shards: int, first: int) -> None:
    shards = [{"rows": count} for count in rows]
    data = DataConfig(train=["any"], window_shards=window_shards)
    begun = replace(arrange({"shards": shards[:first]}, data, 4, 7), offset=3)
    whole = arrange({"shards": shards}, data, 4, 7)
    assert grown(begun, shards, window_shards) == replace(whole, offset=3)


class Repeating(Mixture):
    """Takes every second row twice."""

    def rows(self, positions: Ints) -> Ints:
        return super().rows(positions - positions % 2)


class Unfair(Mixture):
    """Takes the sources in turn, whatever their weights."""

    def draw(self, positions: Ints) -> tuple[Ints, Ints]:
        count = len(self.parts)
        return positions % count, positions // count


class Shuffled(Mixture):
    """Says another source than it takes."""

    def draw(self, positions: Ints) -> tuple[Ints, Ints]:
        sources, places = super().draw(positions)
        return sources, places[::-1].copy()


def test_the_check_sees_a_wrong_order() -> None:
    found = build(10**6, 1 << 12, 512)
    good = found["mixture"]
    assert isinstance(good, Mixture)
    check_mixture(good)
    check_windows(found["windows"], 1 << 12)
    for wrong in (Repeating, Unfair, Shuffled):
        with pytest.raises(AssertionError):
            check_mixture(wrong(good.num_rows, 512, 1, parts=good.parts))
    with pytest.raises(AssertionError, match="window"):
        check_windows(Order(10**6, 512, seed=1), 1 << 12)


@pytest.mark.parametrize("name", ["one_window", "windows", "mixture"])
def test_1024_ranks_over_a_billion_rows(name: str) -> None:
    order = build(ROWS, WINDOW, BATCH)[name]
    assert check(order, RANKS, None if name == "one_window" else WINDOW) >= 3
    measured = measure(order, RANKS, 20)
    assert measured["rank_us_per_batch"] < 20_000 and measured["call_peak_kib"] < 4096
