"""Random search."""

from ftray.core.spec import spec
from ftray.tune.policy import Boundary, Search, Verdict
from ftray.tune.space import Values


@spec
class Random:
    """Members drawn once and trained to the end (Bergstra and Bengio, 2012); a diverged one stays out.

    The draws are a low-discrepancy sequence, which covers the ranges better than independent ones.
    """

    def first(self, search: Search) -> list[Values]:
        """One draw for each member."""
        return search.first(search.size)

    def decide(self, boundary: Boundary) -> Verdict:
        """Nothing is decided."""
        return Verdict()
