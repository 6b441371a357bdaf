"""`ftray tune report`: pictures, the best configuration as a recipe, what the search took and saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config.load import load, write_resolved
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.errors import TuneError
from ftray.core.fs import read_json
from ftray.core.spec import dump, parse
from ftray.core.types import NAME_PATTERN
from ftray.tune.as_searched import LENGTHS
from ftray.tune.journal import read
from ftray.tune.members import JOURNAL, MemberView, members
from ftray.tune.plots import plot, plot_curves, plot_lineage, plot_parallel
from ftray.tune.population import replay
from ftray.tune.result import RESULT, TuneResult, summarise, write_result
from ftray.tune.space import apply
from ftray.tune.track import track

FOLDER = "report"
BEST = "best.yaml"


@dataclass(frozen=True)
class Report:
    """What `report` wrote, and what it is about."""

    result: TuneResult
    members: list[MemberView]
    files: list[Path]


def report(folder: Path) -> Report:
    """Write everything a person wants to see of a search into `folder/report`.

    Also sends each member's curve to TensorBoard there (`members/`), and wherever the recipe's `tracking` says.

    Args:
        folder: the search's folder; the search may be under way.

    Raises:
        TuneError: if there is no search, or no member has a score yet.
    """
    if not (folder / JOURNAL).is_file():
        raise TuneError(f"{folder}: holds no search (no {JOURNAL}); name the folder `output_dir/name` of one")
    folder = folder.absolute()
    records = read(folder / JOURNAL)
    config = load(TuneConfig, folder / "tune.yaml", [])
    found = summarise(config, folder, records, _seconds(folder))
    views = members(folder)
    out = folder / FOLDER
    plot(records, out / "schedules.png", config.metric)
    plot_lineage(records, out / "lineage.png", config.mode)
    plot_curves(views, out / "curves.png")
    plot_parallel(records, out / "parallel.png", config.metric, config.mode)
    recipe = load(Recipe, folder / "recipe.yaml", [])
    track(views, recipe, config.name, out / "members")
    opened = replay(records).opened
    assert opened is not None
    write_resolved(best_recipe(recipe, found, opened["recipe"]["train"]), out / BEST)
    write_result(found, out)
    return Report(found, views, sorted(path for path in out.iterdir() if path.is_file()))


def best_recipe(recipe: Recipe, result: TuneResult, train: dict[str, Any]) -> Recipe:
    """The user's recipe with the winner's last configuration, as long as a member trains in all.

    A schedule that changed on the way is repeated by `ftray tune replay`, not by this recipe.
    """
    data = dump(apply(recipe, result.config))
    data["train"] |= {key: train.get(key) for key in LENGTHS}
    name = f"{result.name}-best"
    data["name"] = name if NAME_PATTERN.fullmatch(name) else "best"
    return parse(Recipe, data)


def _seconds(folder: Path) -> float:
    """Seconds of the last driver, as it wrote them down; 0 of a search under way."""
    path = folder / RESULT
    return float(read_json(path)["seconds"]) if path.is_file() else 0.0
