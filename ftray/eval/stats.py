"""Intervals for rates, means and paired differences.

Rates of right and wrong answers use score intervals, which keep their coverage at small counts and at rates
near 0 and 1, where the textbook (Wald) interval collapses to nothing. Other scores use the normal interval
of the mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided confidence interval."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a rate (Wilson, JASA 22:209-212, 1927).

    Args:
        successes: right answers, 0 to n.
        n: answers, at least 1.
        confidence: coverage aimed at.
    """
    assert n >= 1 and 0 <= successes <= n
    z = _z(confidence)
    rate = successes / n
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * rate * (1 - rate) + z * z / 4)
    # The ends are exact where the formula would leave a rounding error.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(rate, low, high)


def paired_rates(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> Interval:
    """Interval of rate(a) - rate(b), both answering the same rows.

    Newcombe's method 10, "square and add" (Statistics in Medicine 17:2635-2650, 1998): the two Wilson intervals
    are combined with the correlation of the pairs, which is shrunk towards zero for being an estimate.

    Args:
        a: whether the first model was right, by row.
        b: whether the second was, in the same order.
        confidence: coverage aimed at.
    """
    n = len(a)
    assert n == len(b) and n >= 1
    right_a, right_b = sum(a), sum(b)
    both = sum(x and y for x, y in zip(a, b, strict=True))
    first, second = wilson(right_a, n, confidence), wilson(right_b, n, confidence)
    phi = _shrunk_correlation(both, right_a - both, right_b - both, n - right_a - right_b + both)
    difference = first.estimate - second.estimate

    def arm(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    below = arm(first.estimate - first.low, second.high - second.estimate)
    above = arm(second.estimate - second.low, first.high - first.estimate)
    return Interval(difference, difference - below, difference + above)


def mean(scores: Sequence[float], confidence: float = 0.95) -> Interval:
    """Normal interval of a mean, `mean +- z s / sqrt(n)`; without width for a single score."""
    n = len(scores)
    assert n >= 1
    centre = math.fsum(scores) / n
    variance = math.fsum((score - centre) ** 2 for score in scores) / max(1, n - 1)
    half = _z(confidence) * math.sqrt(variance / n)
    return Interval(centre, centre - half, centre + half)


def rate_or_mean(scores: Sequence[float], confidence: float = 0.95) -> Interval:
    """`wilson` if every score is 0 or 1, else `mean`."""
    if set(scores) <= {0.0, 1.0}:
        return wilson(int(sum(scores)), len(scores), confidence)
    return mean(scores, confidence)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of mean(a) - mean(b) on the same rows.

    `paired_rates` if every score is 0 or 1, else the normal interval of the mean of the differences by row
    (Miller, "Adding Error Bars to Evals", arXiv:2411.00640).
    """
    if set(a) | set(b) <= {0.0, 1.0}:
        return paired_rates([x == 1 for x in a], [x == 1 for x in b], confidence)
    return mean([x - y for x, y in zip(a, b, strict=True)], confidence)


def _shrunk_correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_a * only_b
    if product > 0:
        product_corrected = max(0.0, product - (both + only_a + only_b + neither) / 2)
    else:
        product_corrected = float(product)
    return product_corrected / math.sqrt(margins)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
