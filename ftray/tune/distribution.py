"""What values a path may take, and where they lie in their range."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import parse, spec
from ftray.tune.names import nearest


class Distribution(Protocol):
    """Values one path may take."""

    def at(self, position: float) -> Any:
        """The value at a position in [0, 1] of the distribution."""

    def moved(self, value: Any, factor: float) -> Any:
        """A neighbour of `value` within the bounds: times `factor`, or one place up (> 1) or down."""

    def edges(self) -> list[Any]:
        """The values that a recipe must accept."""

    def points(self) -> list[Any] | None:
        """All values, in order; None if they are not countable."""


@spec
class Uniform:
    """Evenly spread over [low, high], in steps of `step` from `low` if that is given."""

    low: float
    high: float
    step: float = Field(default=0.0, ge=0)
    """0: any value."""
    log: bool = False
    """Evenly spread over the logarithm."""
    integer: bool = False
    """Whole numbers only."""

    def __post_init__(self) -> None:
        if not self.low < self.high or not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ConfigError(f"[{self.low:g}, {self.high:g}] is empty; write [low, high] with low < high")
        if self.log and self.low <= 0:
            raise ConfigError(f"low is {self.low:g}; a logarithmic range starts above 0")
        if self.step > self.high - self.low:
            raise ConfigError(f"step {self.step:g} is longer than the range; take a shorter one")

    def at(self, position: float) -> float | int:
        """The value at a position of the range."""
        if self.step:
            return self._rounded(self.low + self.step * math.floor(position * (self.num_steps + 1)))
        if self.log:
            return self._rounded(self.low * (self.high / self.low) ** position)
        return self._rounded(self.low + position * (self.high - self.low))

    def moved(self, value: Any, factor: float) -> float | int:
        """`value * factor`, at least one step away, or as near as the bounds allow."""
        target = self._rounded(value * factor)
        if target == value and self.step:
            target = self._rounded(value + math.copysign(self.step, factor - 1))
        return target

    def edges(self) -> list[Any]:
        """Both bounds, and what lies between them: a field of whole numbers takes 1.0, but not 1.38."""
        return [self._rounded(self.low), self._rounded(self.high), self.at(0.38)]

    def points(self) -> list[Any] | None:
        """Every step from `low` on; None without steps."""
        if not self.step:
            return None
        return [self._rounded(self.low + place * self.step) for place in range(self.num_steps + 1)]

    def nearest(self, value: float) -> float | int:
        """The value of the range that is nearest to a number."""
        return self._rounded(value)

    @property
    def num_steps(self) -> int:
        """Steps from `low` to the last value."""
        return math.floor((self.high - self.low) / self.step + 1e-9)

    def _rounded(self, value: float) -> float | int:
        if self.step:
            value = self.low + self.step * min(max(round((value - self.low) / self.step), 0), self.num_steps)
        if self.integer:
            return round(value)
        # Four digits keep journals and tables legible; the bounds come last because rounding may pass them.
        return min(max(float(f"{value:.4g}"), self.low), self.high)


@spec
class Choice:
    """One of a list. Neighbours in the list are neighbours for a perturbation, so write numbers in order."""

    values: list[Any] = Field(min_length=1)

    def at(self, position: float) -> Any:
        """The value at a position of the list."""
        return self.values[min(int(position * len(self.values)), len(self.values) - 1)]

    def moved(self, value: Any, factor: float) -> Any:
        """The next value up or down the list; the end of the list turns back."""
        if value not in self.values:
            return self.values[0]
        place = self.values.index(value) + (1 if factor > 1 else -1)
        return self.values[min(max(place, 0), len(self.values) - 1)]

    def edges(self) -> list[Any]:
        """Every value."""
        return list(self.values)

    def points(self) -> list[Any]:
        """Every value."""
        return list(self.values)


_FORMS = {
    "uniform": "[low, high]",
    "loguniform": "[low, high]",
    "quniform": "[low, high, step]",
    "int": "[low, high]",
    "choice": "[a, b, ...]",
}


def parse_distribution(data: Mapping[str, Any], where: str) -> Distribution:
    """Build a distribution from `{loguniform: [1e-3, 1e-2]}`.

    Raises:
        ConfigError: one line naming the path, the value and the remedy.
    """
    if len(data) != 1:
        raise ConfigError(f"{where}: {dict(data)!r} is not one distribution; write e.g. {{uniform: [0, 1]}}")
    [(name, arguments)] = data.items()
    if name not in _FORMS:
        raise ConfigError(f"{where}: {name!r} is not a distribution; {nearest(str(name), list(_FORMS))}")
    if name == "choice":
        return parse(Choice, {"values": arguments}, where=where)
    count = 3 if name == "quniform" else 2
    numbers = isinstance(arguments, list) and all(isinstance(a, int | float) for a in arguments)
    if not numbers or len(arguments) != count:
        raise ConfigError(f"{where}: {arguments!r} is refused; write {{{name}: {_FORMS[name]}}}")
    settings: dict[str, Any] = {"low": arguments[0], "high": arguments[1], "log": name == "loguniform"}
    if name == "quniform":
        settings["step"] = arguments[2]
    if name == "int":
        settings |= {"step": 1, "integer": True}
    return parse(Uniform, settings, where=where)
