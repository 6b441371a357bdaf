"""What values of a search must keep to: comparisons of paths with numbers or other paths, as plain data."""

import operator
from collections.abc import Callable
from typing import Any

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec

_COMPARED: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "less_than": ("<", operator.lt),
    "at_most": ("<=", operator.le),
    "greater_than": (">", operator.gt),
    "at_least": (">=", operator.ge),
}

Lookup = Callable[[str], Any]
"""The value at a dotted path: of a member's configuration, else of the recipe."""


@spec
class Constraint:
    """`{path: adapt.lora_alpha, at_least: adapt.r}`, `{product: [adapt.r, data.max_length], at_most: 9999}`."""

    path: str = ""
    """Dotted recipe path of what is compared."""
    sum: list[str] = Field(default_factory=list)
    """Instead of `path`: paths whose sum is compared."""
    product: list[str] = Field(default_factory=list)
    """Instead of `path`: paths whose product is compared."""
    less_than: float | str | None = None
    """A number, or the path of one."""
    at_most: float | str | None = None
    """A number, or the path of one."""
    greater_than: float | str | None = None
    """A number, or the path of one."""
    at_least: float | str | None = None
    """A number, or the path of one."""
    times: float = 1.0
    """What the other side is multiplied by."""

    def __post_init__(self) -> None:
        if sum(map(bool, (self.path, self.sum, self.product))) != 1:
            raise ConfigError("path: say what is compared, by one of `path`, `sum` and `product`")
        if not self._given:
            raise ConfigError(f"{self._left}: compared with nothing; add one of {', '.join(_COMPARED)}")

    @property
    def paths(self) -> list[str]:
        """Every path it speaks of."""
        others = [bound for bound in self._given.values() if isinstance(bound, str)]
        return [*([self.path] if self.path else []), *self.sum, *self.product, *others]

    @property
    def _given(self) -> dict[str, float | str]:
        return {name: bound for name in _COMPARED if (bound := getattr(self, name)) is not None}

    @property
    def _left(self) -> str:
        return self.path or " + ".join(self.sum) or " * ".join(self.product)

    def __str__(self) -> str:
        times = "" if self.times == 1 else f" * {self.times:g}"
        return " and ".join(
            f"{self._left} {_COMPARED[name][0]} {bound:g}{times}"
            if isinstance(bound, int | float)
            else f"{self._left} {_COMPARED[name][0]} {bound}{times}"
            for name, bound in self._given.items()
        )

    def holds(self, look_up: Lookup) -> bool:
        """True if the values keep to it.

        Raises:
            ConfigError: if a path holds no number.
        """

        def number(of: float | str) -> float:
            value = look_up(of) if isinstance(of, str) else of
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"constraints: {of} is {value!r}, which cannot be compared; name a number")
            return float(value)

        left = number(self.path) if self.path else 0.0
        left += sum(number(path) for path in self.sum)
        if self.product:
            left = 1.0
            for path in self.product:
                left *= number(path)
        return all(
            _COMPARED[name][1](left, number(bound) * self.times) for name, bound in self._given.items()
        )
