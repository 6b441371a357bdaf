"""Do the rows fit the objective?"""

from collections.abc import Iterable, Mapping
from typing import Any

from ftray import catalog
from ftray.data.pairs import check_kind


def check_rows(objective: Any, manifests: Iterable[Mapping[str, Any]]) -> None:
    """Refuse prepared rows of a kind that an objective cannot learn from. Raises `DataError`, one line."""
    name = catalog.name_of(type(objective)) or type(objective).__name__
    for manifest in manifests:
        # An objective of the user's own that says nothing learns from rows one by one.
        check_kind(manifest, pairs=getattr(objective, "pairs", False), objective=name)
