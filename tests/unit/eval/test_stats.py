"""Intervals against published values, identities and simulated coverage."""

import numpy as np
import pytest

from ftray.eval.stats import Interval, mean, paired_difference, paired_rates, rate_or_mean, wilson


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17:857-872 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published_values(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_is_symmetric_and_exact_at_the_ends() -> None:
    few, many = wilson(3, 40), wilson(37, 40)
    assert few.low == pytest.approx(1 - many.high) and few.high == pytest.approx(1 - many.low)
    assert wilson(0, 7).low == 0.0 and wilson(7, 7).high == 1.0


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al., Statistics with Confidence (2000), table 6.2
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland et al., Stat. Med. 33:2850-2875 (2014), Bentur data
    ],
)
def test_newcombe_published_values(table: tuple[int, int, int, int], low: float, high: float) -> None:
    interval = paired_rates(*pairs(*table))
    assert interval.low == pytest.approx(low, abs=6e-4)
    assert interval.high == pytest.approx(high, abs=6e-4)


def test_paired_difference_changes_sign_with_its_arguments() -> None:
    a, b = pairs(30, 25, 5, 40)
    there, back = paired_rates(a, b), paired_rates(b, a)
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert there.excludes_zero and not paired_rates(a, a).excludes_zero


def test_difference_to_a_model_that_is_always_wrong_is_its_own_wilson_below() -> None:
    a, b = pairs(0, 60, 0, 40)
    interval = paired_rates(a, b)
    assert interval.estimate == pytest.approx(0.6)
    assert interval.excludes_zero and interval.low < wilson(60, 100).low


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_newcombe_covers_the_truth_as_often_as_it_says(shared: float) -> None:
    random = np.random.default_rng(7)
    n, truth, hits, trials = 60, 0.55 - 0.35, 0, 2000
    for _ in range(trials):
        common = random.random(n)
        use_common = random.random(n) < shared
        a = np.where(use_common, common, random.random(n)) < 0.55
        b = np.where(use_common, common, random.random(n)) < 0.35
        interval = paired_rates(a.tolist(), b.tolist())
        hits += interval.low <= truth <= interval.high
    assert 0.935 <= hits / trials <= 0.985


def test_mean_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(8)
    samples = random.exponential(1.0, (2000, 200))
    hits = sum(interval.low <= 1.0 <= interval.high for interval in map(mean, samples.tolist()))
    assert 0.92 <= hits / 2000 <= 0.97


def test_scores_pick_the_method_that_fits_them() -> None:
    assert rate_or_mean([0.0, 1.0, 1.0]) == wilson(2, 3)
    assert rate_or_mean([0.0, 0.5, 1.0]) == mean([0.0, 0.5, 1.0])
    assert paired_difference([1.0, 0.0], [0.0, 0.0]) == paired_rates([True, False], [False, False])
    assert paired_difference([0.75, 0.5], [0.25, 0.0]) == Interval(0.5, 0.5, 0.5)
