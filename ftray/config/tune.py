"""A search: which recipe, over which fields, by which policy."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ftray.config.constraint import Constraint
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
    """The recipe file each member trains."""
    overrides: list[str] = Field(default_factory=list)
    """`a.b=value` changes to the recipe."""
    space: dict[str, dict[str, Any]] = Field(min_length=1)
    """Dotted recipe path -> distribution: `{loguniform: [1e-3, 1e-2]}`, `{uniform: [a, b]}`,
    `{quniform: [a, b, step]}`, `{int: [a, b]}`, `{choice: [..]}`."""
    constraints: list[Constraint] = Field(default_factory=list)
    """What the values must keep to: `{path: adapt.lora_alpha, at_least: adapt.r}`."""
    policy: Annotated[Any, Piece("search")] = Field(default="pbt", validate_default=True)
    """Who trains on, with what."""
    executor: Annotated[Any, Piece("executor")] = Field(default="trials", validate_default=True)
    """How members are trained: each in trials of its own, or many of them over one base in memory."""
    num_members: int | None = Field(default=None, ge=1)
    """Members of the population (of `tpe`: in all); null: 4, for `grid` all its points."""
    num_segments: int = Field(default=3, ge=1)
    """Segments (generations) of each member: its budget."""
    max_segments: int | None = Field(default=None, ge=1)
    """Segments of the whole population after which no more are begun: its budget; null: as its members have."""
    segment_steps: int = Field(default=50, ge=1)
    """Optimiser steps in one segment."""
    segment_evaluations: int | None = Field(default=None, ge=1)
    """Instead of `segment_steps`: validations in one segment, one every `train.eval_steps` of the recipe."""
    segment_tokens: int | None = Field(default=None, ge=1)
    """Instead of `segment_steps`: tokens in one segment, so that members of different batches are compared after
    as much text; each ends with the step that reaches them."""
    asynchronous: bool = False
    """Decide about each member as soon as it is through, by what is known then: nobody waits, but another number
    of slots or a killed driver gives another search. What the journal holds is kept to all the same."""
    metric: str = "eval_loss"
    """Metric of a segment that decides."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of the metric is better."""
    max_concurrent: int = Field(default=2, ge=1)
    """Segments that run at once."""
    cpus_per_trial: float = Field(default=1.0, gt=0)
    """CPUs one segment takes."""
    gpus_per_trial: float = Field(default=0.0, ge=0)
    """GPUs one segment takes, or a population; with `spread` the workers of its group claim theirs instead."""
    resources_per_trial: dict[str, float] = Field(default_factory=dict)
    """Further resources of Ray that one trial claims, named as nodes were started with them: `{fast_disk: 1}`."""
    spread: bool = False
    """Train each segment as the recipe's `strategy` says, in a Ray Train group of its own (about 20 s to start), if
    that is more than one worker. Otherwise one worker trains it, which changes its result by rounding only."""
    max_failures: int = Field(default=1, ge=0)
    """Times a crashed segment, or a population whose process died, is run again from its newest checkpoint before
    the member is replaced, or the population's search ends; counted anew after progress."""
    stall_s: float | None = Field(default=1800.0, gt=0)
    """Seconds without a sign of progress from any segment after which the search ends; null: never."""
    train_fn: str = TRAIN_FN
    """What trains a segment: `package.module:function(recipe, io, *, start_from, stop_at)`."""
    seed: int = Field(default=0, ge=0)
    """Seeds the first population, donors and perturbations."""

    @property
    def segment_length(self) -> int:
        """Optimiser steps in one segment, or tokens if `segment_tokens` is set."""
        return self.segment_tokens or self.segment_steps

    def __post_init__(self) -> None:
        if self.segment_tokens is not None and self.segment_evaluations is not None:
            raise ConfigError("segment_tokens: also `segment_evaluations` is set; keep one of the two")
        if self.spread and self.train_fn != TRAIN_FN:
            raise ConfigError(f"spread: {self.train_fn} runs in one process; leave one of the two out")
        _check_resources(self.resources_per_trial)
        if not is_name(self.name):
            raise ConfigError(f"name: {self.name!r} is refused; use a-z, 0-9, `.`, `_`, `-`")


def _check_resources(resources: dict[str, float]) -> None:
    for name, amount in resources.items():
        if name.lower() in ("cpu", "gpu"):
            raise ConfigError(
                f"resources_per_trial: {name} has a field of its own: `{name.lower()}s_per_trial`"
            )
        if not 0 < amount < float("inf"):
            raise ConfigError(f"resources_per_trial: {name}: {amount:g} is refused; claim more than 0")
