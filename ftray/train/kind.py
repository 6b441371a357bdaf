"""Do the rows fit the objective, and which of their tokens does it learn?"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ftray import catalog
from ftray.config.recipe import DataConfig
from ftray.data.pairs import check_kind
from ftray.data.transform.prompt_weight import EveryToken


def check_rows(objective: Any, manifests: Iterable[Mapping[str, Any]]) -> None:
    """Refuse prepared rows of a kind that an objective cannot learn from. Raises `DataError`, one line."""
    name = catalog.name_of(type(objective)) or type(objective).__name__
    for manifest in manifests:
        # An objective of the user's own that says nothing learns from rows one by one.
        check_kind(manifest, pairs=getattr(objective, "pairs", False), objective=name)


def rows_for(objective: Any, data: DataConfig) -> DataConfig:
    """The data as an objective reads it: one that learns every token makes targets of them all first."""
    if not getattr(objective, "every_token", False):
        return data
    transforms = [*data.prepare_transforms, EveryToken(), *data.read_transforms]
    return dataclasses.replace(data, transforms=transforms)
