"""The search space: recipe paths and their distributions, sampled and perturbed without any state.

Every random number is a hash of a key (seed, purpose, member, segment, path), so that a search gives the same
values in whatever order its members finish and however often its driver was killed.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import dump, parse, set_path, spec

STRUCTURAL = ("adapt", "data", "model", "objective", "seed")
"""Sections whose value belongs to the trained state: a member takes them over with its donor's checkpoint."""

OWNED = ("name", "output_dir", "strategy", "tracking")
OWNED_TRAIN = ("max_steps", "num_train_epochs", "max_time_s", "eval_steps", "save_steps")
"""Sections, and fields of `train`, that the search sets itself: it says how long, where, in one worker."""


def unit(*key: Any) -> float:
    """A number in [0, 1) that depends on `key` alone (53 bits of its SHA-256)."""
    digest = hashlib.sha256(json.dumps(key, separators=(",", ":")).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def pick(items: list[Any], *key: Any) -> Any:
    """One of `items`, chosen by `key` alone."""
    return items[min(int(unit(*key) * len(items)), len(items) - 1)]


class Distribution(Protocol):
    """Values one path may take."""

    def at(self, position: float) -> Any:
        """The value at a position in [0, 1] of the distribution."""

    def moved(self, value: Any, factor: float) -> Any:
        """A neighbour of `value` within the bounds: times `factor`, or one place up (> 1) or down."""

    def edges(self) -> list[Any]:
        """The values that a recipe must accept."""


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
            return self._rounded(self.low + self.step * math.floor(position * (self._num_steps + 1)))
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
        """Both bounds."""
        return [self._rounded(self.low), self._rounded(self.high)]

    @property
    def _num_steps(self) -> int:
        return math.floor((self.high - self.low) / self.step + 1e-9)

    def _rounded(self, value: float) -> float | int:
        if self.step:
            value = self.low + self.step * min(max(round((value - self.low) / self.step), 0), self._num_steps)
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


class Space:
    """The paths of a search and how their values are drawn.

    Args:
        space: dotted recipe path -> distribution, as in `TuneConfig.space`.

    Raises:
        ConfigError: for a distribution that is not one, or a path the search sets itself.
    """

    def __init__(self, space: Mapping[str, Mapping[str, Any]]) -> None:
        # Sorted, so that `adapt` is set before `adapt.r` and the order of the file changes nothing.
        self.distributions = {
            path: parse_distribution(space[path], f"space.{path}") for path in sorted(space)
        }
        for path in self.distributions:
            section, _, field = path.partition(".")
            if section in OWNED or (section == "train" and field in OWNED_TRAIN):
                raise ConfigError(f"space.{path}: the search sets this field itself; leave it out")

    @property
    def mutable(self) -> list[str]:
        """Paths that may change under a trained state."""
        return [path for path in self.distributions if not is_structural(path)]

    def sample(self, seed: int, member: int) -> dict[str, Any]:
        """The first configuration of a member.

        Positions follow Roberts' R_d sequence from a random start (the Kronecker lattice of the generalised
        golden ratio), so that even four members cover every range and every pair of ranges.
        """
        ratio = _generalised_golden_ratio(len(self.distributions))
        config = {}
        for place, (path, distribution) in enumerate(self.distributions.items(), start=1):
            config[path] = distribution.at((unit(seed, "sample", path) + member * ratio**-place) % 1.0)
        return config

    def perturb(
        self, config: Mapping[str, Any], factors: list[float], resample: float, *key: Any
    ) -> dict[str, Any]:
        """A donor's configuration with every mutable path moved within its bounds.

        Args:
            config: the donor's configuration; structural paths stay as they are.
            factors: what a value may be multiplied by.
            resample: probability of drawing a path anew instead.
            key: what the random numbers depend on.
        """
        moved = dict(config)
        for path in self.mutable:
            distribution = self.distributions[path]
            if unit(*key, path, "resample") < resample:
                moved[path] = distribution.at(unit(*key, path, "value"))
                continue
            factor = pick(factors, *key, path, "factor")
            candidates = [distribution.moved(config[path], f) for f in (factor, *factors)]
            # At a bound the chosen factor may change nothing; another one turns back into the range.
            moved[path] = next((c for c in candidates if c != config[path]), config[path])
        return moved

    def check(self, recipe: Any) -> None:
        """Check every path and its outermost values against a recipe.

        Raises:
            ConfigError: for a path the recipe does not have, with near misses, or a value it refuses.
        """
        plain = dump(recipe)
        known = _paths(plain)
        for path, distribution in self.distributions.items():
            if path not in known:
                raise ConfigError(f"space.{path}: the recipe has no such field; {nearest(path, known)}")
            for value in distribution.edges():
                apply(recipe, {path: value}, where=f"space.{path}")


def is_structural(path: str) -> bool:
    """True if the value at a path belongs to the trained state and so cannot change under it."""
    section, _, rest = path.partition(".")
    return section in STRUCTURAL or not rest or path.endswith(".type")


def apply(recipe: Any, config: Mapping[str, Any], where: str = "") -> Any:
    """A recipe with a member's configuration set, checked again."""
    data = dump(recipe)
    for path, value in config.items():
        set_path(data, path, value)
    return parse(type(recipe), data, where=where)


def _generalised_golden_ratio(dimensions: int) -> float:
    """The root above 1 of x^(d+1) = x + 1."""
    ratio = 2.0
    for _ in range(40):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    return ratio


def nearest(name: str, known: list[str]) -> str:
    """The remedy for an unknown name: the nearest known ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    # A path is often right but for its section.
    near = near or [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]][:3]
    if not near:
        return f"known: {', '.join(known)}"
    return "did you mean " + " or ".join(f"`{item}`" for item in near) + "?"


def _paths(data: Any, prefix: str = "") -> list[str]:
    if not isinstance(data, Mapping):
        return []
    found = []
    for key, value in data.items():
        found += [prefix + key, *_paths(value, f"{prefix}{key}.")]
    return found
