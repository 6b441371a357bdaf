"""The members of a search to TensorBoard and wherever the recipe sends its metrics: one curve a member."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ftray.config.recipe import Recipe
from ftray.core.spec import replace
from ftray.core.types import NAME_PATTERN
from ftray.train.track import Tracker
from ftray.train.track.tensorboard import TensorBoard
from ftray.tune.members import MemberView


def track(views: Sequence[MemberView], recipe: Recipe, search: str, folder: Path) -> None:
    """Write each member's joined curve anew.

    Args:
        views: the members.
        recipe: the user's; its `tracking` says where to besides TensorBoard.
        search: the search's name; a member is known as `<search>-m000`.
        folder: where a folder for each member is made.
    """
    shutil.rmtree(folder, ignore_errors=True)
    trackers: list[Tracker] = [TensorBoard(), *(t for t in recipe.tracking if t != TensorBoard())]
    for view in views:
        name = f"{search}-m{view.index:03}"
        named = replace(recipe, "name", name if NAME_PATTERN.fullmatch(name) else f"m{view.index:03}")
        home = folder / f"m{view.index:03}"
        home.mkdir(parents=True)
        for tracker in trackers:
            sink = tracker.open(named, home, 0)
            for record in view.curve:
                sink.log(record)
            sink.close()
