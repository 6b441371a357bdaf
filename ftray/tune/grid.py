"""Grid search."""

import itertools

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.tune.policy import Boundary, Search, Verdict
from ftray.tune.space import Values


@spec
class Grid:
    """Every combination of values, each trained to the end; those that constraints forbid are left out."""

    points_per_range: int | None = Field(default=None, ge=2)
    """Evenly spaced values, both bounds among them, that stand for a range without steps; null: such a range is
    refused."""

    def first(self, search: Search) -> list[Values]:
        """One member for each point."""
        space = search.space
        columns = {path: self._values(path, search) for path in space.distributions}
        product = itertools.product(*columns.values())
        points = [dict(zip(columns, point, strict=True)) for point in product]
        allowed = [point for point in points if space.allows(point)]
        if not allowed:
            raise ConfigError("constraints: no point of the grid keeps to them; take other values")
        if search.num_members not in (None, len(allowed)):
            raise ConfigError(
                f"num_members: {search.num_members}, but the grid has {len(allowed)} points; leave it out"
            )
        return allowed

    def _values(self, path: str, search: Search) -> list[object]:
        distribution = search.space.distributions[path]
        points = distribution.points()
        if points is None and self.points_per_range is None:
            raise ConfigError(
                f"space.{path}: a range without steps is no part of a grid; use `quniform` or `choice`, or set "
                "`policy.points_per_range`"
            )
        count = self.points_per_range or 0
        found = points if points is not None else [distribution.at(i / (count - 1)) for i in range(count)]
        return list(dict.fromkeys(found)) if all(isinstance(v, int | float | str) for v in found) else found

    def decide(self, boundary: Boundary) -> Verdict:
        """Nothing is decided."""
        return Verdict()
