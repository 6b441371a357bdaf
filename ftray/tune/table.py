"""The members as a table, while they train and afterwards."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ftray.core.paths import value_at
from ftray.tune.members import status
from ftray.tune.population import Population

_ALWAYS = ("optim.learning_rate", "adapt.r")
"""Fields of a recipe that are shown also if they are not searched."""


def table(population: Population, mode: str, num_segments: int) -> Table:
    """The members as they stand: status, score, learning rate, rank, other searched values, lineage."""
    fixed = _fixed(population)
    searched = list(population.members[0].config) if population.members else []
    paths = [*[path for path in fixed if path not in searched], *searched]
    names = [path.rpartition(".")[2] for path in paths]
    view = Table("member", "status", "segments", "score", *names, "lineage")
    best = population.best(mode)
    for member in population.members:
        view.add_row(
            str(member.index),
            status(population, member, num_segments),
            f"{min(member.segment, num_segments)}/{num_segments}",
            "" if member.score is None else f"{member.score:.4f}",
            *[_shown(member.config.get(path, fixed.get(path))) for path in paths],
            " > ".join(str(index) for index in member.lineage),
            style="bold" if member is best else None,
        )
    return view


def _fixed(population: Population) -> Mapping[str, Any]:
    recipe = (population.opened or {}).get("recipe", {})
    found = {path: value_at(recipe, path) for path in _ALWAYS}
    return {path: value for path, value in found.items() if value is not None}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
