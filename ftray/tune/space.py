"""The search space: recipe paths and their distributions, sampled and perturbed without any state.

Every random number is a hash of a key (seed, purpose, member, segment, path), so that a search gives the same
values in whatever order its members finish and however often its driver was killed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftray.config.constraint import Constraint
from ftray.core.errors import ConfigError
from ftray.core.paths import paths, set_path, value_at
from ftray.core.spec import dump, parse
from ftray.tune.distribution import parse_distribution
from ftray.tune.names import nearest

STRUCTURAL = ("adapt", "data", "model", "objective", "seed")
"""Sections whose value belongs to the trained state: a member takes them over with its donor's checkpoint."""

OWNED = ("name", "output_dir", "strategy", "tracking")
OWNED_TRAIN = ("max_steps", "num_train_epochs", "max_tokens", "max_time_s", "eval_steps", "save_steps")
"""Sections, and fields of `train`, that the search sets itself: it says how long, where, in one worker."""

_DRAWS = 1000
"""Draws after which constraints are taken to leave no room."""

Values = dict[str, Any]
"""A member's configuration: recipe path -> value."""


def unit(*key: Any) -> float:
    """A number in [0, 1) that depends on `key` alone (53 bits of its SHA-256)."""
    digest = hashlib.sha256(json.dumps(key, separators=(",", ":")).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def pick(items: Sequence[Any], *key: Any) -> Any:
    """One of `items`, chosen by `key` alone."""
    return items[min(int(unit(*key) * len(items)), len(items) - 1)]


class Space:
    """The paths of a search, how their values are drawn and what they must keep to.

    Args:
        space: dotted recipe path -> distribution, as in `TuneConfig.space`.
        constraints: as in `TuneConfig.constraints`.
        recipe: the recipe as plain data, for constraints that name fields outside the space.

    Raises:
        ConfigError: for a distribution that is not one, a path the search sets itself, or constraints that name
            what is not there.
    """

    def __init__(
        self,
        space: Mapping[str, Mapping[str, Any]],
        constraints: Sequence[Constraint] = (),
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        # Sorted, so that `adapt` is set before `adapt.r` and the order of the file changes nothing.
        self.distributions = {
            path: parse_distribution(space[path], f"space.{path}") for path in sorted(space)
        }
        self.constraints = list(constraints)
        self._recipe = recipe or {}
        for path in self.distributions:
            section, _, field = path.partition(".")
            if path == "train":
                raise ConfigError("space.train: the search sets fields of it itself; name one, as `train.x`")
            if section in OWNED or (section == "train" and field in OWNED_TRAIN):
                raise ConfigError(f"space.{path}: the search sets this field itself; leave it out")
        known = [*self.distributions, *paths(self._recipe)]
        for constraint in self.constraints:
            for path in constraint.paths:
                if path not in known:
                    raise ConfigError(f"constraints: {path}: no such field; {nearest(path, known)}")

    @property
    def mutable(self) -> list[str]:
        """Paths that may change under a trained state."""
        return [path for path in self.distributions if not is_structural(path)]

    def allows(self, config: Mapping[str, Any]) -> bool:
        """True if a configuration keeps to every constraint."""

        def look_up(path: str) -> Any:
            return config[path] if path in config else value_at(self._recipe, path)

        return all(constraint.holds(look_up) for constraint in self.constraints)

    def sample(self, seed: int, member: int) -> Values:
        """The first configuration of a member.

        Positions follow Roberts' R_d sequence from a random start (the Kronecker lattice of the generalised
        golden ratio), so that even four members cover every range and every pair of ranges. Where constraints
        forbid a point of it, independent draws take its place.

        Raises:
            ConfigError: if no draw keeps to the constraints.
        """
        ratio = _generalised_golden_ratio(len(self.distributions))
        config = {}
        for place, (path, distribution) in enumerate(self.distributions.items(), start=1):
            config[path] = distribution.at((unit(seed, "sample", path) + member * ratio**-place) % 1.0)
        attempt = 0
        while not self.allows(config):
            if attempt == _DRAWS:
                rules = "; ".join(str(constraint) for constraint in self.constraints)
                raise ConfigError(f"constraints: {rules}: nothing of the space keeps to this; widen a range")
            config = {
                path: distribution.at(unit(seed, "sample", path, member, attempt))
                for path, distribution in self.distributions.items()
            }
            attempt += 1
        return config

    def perturb(self, config: Mapping[str, Any], factors: list[float], resample: float, *key: Any) -> Values:
        """A donor's configuration with every mutable path moved within its bounds.

        Args:
            config: the donor's configuration; structural paths stay as they are.
            factors: what a value may be multiplied by.
            resample: probability of drawing a path anew instead.
            key: what the random numbers depend on.

        Returns:
            The new configuration, or that of the donor if constraints forbid every move that was tried.
        """
        for attempt in range(_DRAWS):
            moved = self._moved(config, factors, resample, *key, *([attempt] if attempt else []))
            if self.allows(moved):
                return moved
        return dict(config)

    def _moved(self, config: Mapping[str, Any], factors: list[float], resample: float, *key: Any) -> Values:
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
        """Check every path and its outermost values against a recipe, and that constraints leave room.

        Raises:
            ConfigError: for a path the recipe does not have, with near misses, or a value it refuses.
        """
        plain = dump(recipe)
        known = paths(plain)
        for path, distribution in self.distributions.items():
            if path not in known:
                raise ConfigError(f"space.{path}: the recipe has no such field; {nearest(path, known)}")
            for value in distribution.edges():
                try:
                    apply(recipe, {path: value}, where=f"space.{path}")
                except ConfigError as error:
                    raise ConfigError(f"{error}{_of_type(path)}") from None
        self.sample(0, 0)


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


def _of_type(path: str) -> str:
    """A remedy for a piece whose type alone is searched: settings of the recipe's piece may not be another's."""
    whole = path.removesuffix(".type")
    return "" if whole == path else f"; search `{whole}` as a whole, by choice"


def _generalised_golden_ratio(dimensions: int) -> float:
    """The root above 1 of x^(d+1) = x + 1."""
    ratio = 2.0
    for _ in range(40):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    return ratio
