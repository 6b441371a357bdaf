"""A search: which recipe, over which fields, by which policy."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import Piece, spec
from ftray.core.types import is_name

TRAIN_FN = "ftray.train.worker:train"


@spec
class TuneConfig:
    """A search over one recipe's fields."""

    name: str
    """The search's name; its folder is `output_dir/name`."""
    output_dir: str = "runs"
    """Where searches are kept."""
    recipe: str
    """The recipe file each member trains, in one worker whatever its `strategy`."""
    overrides: list[str] = Field(default_factory=list)
    """`a.b=value` changes to the recipe."""
    space: dict[str, dict[str, Any]] = Field(min_length=1)
    """Dotted recipe path -> distribution: `{loguniform: [1e-3, 1e-2]}`, `{uniform: [a, b]}`,
    `{quniform: [a, b, step]}`, `{int: [a, b]}`, `{choice: [..]}`."""
    policy: Annotated[Any, Piece("search")] = Field(default="pbt", validate_default=True)
    """Who trains on, with what."""
    num_members: int = Field(default=4, ge=1)
    """Members of the population."""
    num_segments: int = Field(default=3, ge=1)
    """Segments (generations) of each member."""
    segment_steps: int = Field(default=50, ge=1)
    """Optimiser steps in one segment."""
    metric: str = "eval_loss"
    """Metric of a segment that decides."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of the metric is better."""
    max_concurrent: int = Field(default=2, ge=1)
    """Segments that run at once."""
    cpus_per_trial: float = Field(default=1.0, gt=0)
    """CPUs one segment takes."""
    max_failures: int = Field(default=1, ge=0)
    """Times a crashed segment is run again before its member is replaced."""
    train_fn: str = TRAIN_FN
    """What trains a segment: `package.module:function(recipe, io, *, start_from, stop_at)`."""
    seed: int = Field(default=0, ge=0)
    """Seeds the first population, donors and perturbations."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError(f"name: {self.name!r} is refused; use a-z, 0-9, `.`, `_`, `-`")
