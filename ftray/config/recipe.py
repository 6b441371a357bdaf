"""The recipe: the one tree that says what a training run is.

model x data(transforms) x adapt x objective x optim x strategy -> one run
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ftray import catalog
from ftray.config.train import TrainConfig
from ftray.core.errors import ConfigError
from ftray.core.facts import check_facts
from ftray.core.spec import Piece, spec
from ftray.core.types import is_name


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


def _is_barrier(transform: Any) -> bool:
    """As `ftray.data.transform.base.Barrier`, which a configuration does not import."""
    return hasattr(transform, "keys") and hasattr(transform, "keep")


def _looks_ahead(transform: Any) -> bool:
    """True for a barrier that is no `ftray.data.transform.base.RunningBarrier`."""
    return _is_barrier(transform) and not hasattr(transform, "running")


def is_read_time(transform: Any) -> bool:
    """True for a transform of packed rows, which says `stage = "read"`; any other is one of preparation."""
    return getattr(transform, "stage", "prepare") == "read"


RowField = Literal[
    "chosen",
    "completion",
    "conversations",
    "history",
    "input",
    "instruction",
    "label",
    "messages",
    "output",
    "prompt",
    "rejected",
    "system",
    "text",
    "tools",
]
"""What the known shapes of rows read (`ftray.data.shapes`)."""


def _draws_validation(transform: Any) -> bool:
    return catalog.name_of(type(transform)) == "split" and transform.validation > 0


Paths = Annotated[list[str], BeforeValidator(_as_list)]


@spec
class ModelConfig:
    """The base model and its tokenizer."""

    model_name_or_path: str = ""
    """A Hugging Face folder or Hub id. With `init: config` it may stay empty."""
    tokenizer_name_or_path: str = ""
    """Tokenizer folder or id; empty: the model's own."""
    init: Literal["pretrained", "config"] = "pretrained"
    """`pretrained` reads the weights; `config` starts from random weights."""
    config: dict[str, Any] = Field(default_factory=dict)
    """With `init: config`: the model's configuration (`model_type`, `hidden_size`, ...)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the weights are held in. Computation may be narrower (`train.bf16`)."""

    def __post_init__(self) -> None:
        if self.init == "pretrained" and not self.model_name_or_path:
            raise ConfigError("model_name_or_path: missing; name a model folder, or set `init: config`")
        if self.init == "config" and "model_type" not in self.config:
            raise ConfigError("config: `model_type` is missing; with `init: config` say which architecture")

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is."""
        return self.tokenizer_name_or_path or self.model_name_or_path


@spec
class MixtureEntry:
    """A source's share of training."""

    source: str
    """One of the entries of `data.train`, as written there."""
    weight: float = Field(gt=0)
    """Share of the rows of training; shares are divided by their sum."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Passes over the source after which its share goes to the others."""


def _as_mixture(value: Any) -> Any:
    """`{source: weight}` for short."""
    if isinstance(value, dict):
        return [{"source": source, "weight": weight} for source, weight in value.items()]
    return value


@spec
class DataConfig:
    """Where the rows come from and how they become token shards."""

    train: Paths
    """Training rows: files, globs, folders, URLs or Hub ids; `#500` behind one takes 500 of its rows."""
    validation: Paths = Field(default_factory=list)
    """Files or globs of validation rows; empty: no validation loss, or what the transform `split` sets apart."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What a row of a plain text file is: the whole file, a run of lines between blank ones, or a line."""
    columns: dict[RowField, str] = Field(default_factory=dict)
    """Where the rows hold what, if not under the known names: `{prompt: question, completion: answer}`."""
    transforms: list[Annotated[Any, Piece("transform")]] = Field(default_factory=lambda: ["clean", "length"])
    """Steps on rows, in order: those of preparation, then those that change packed rows whenever they are read."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens in one row of training."""
    packing: bool = True
    """Put several documents into one row; attention and positions stay apart."""
    overlong: Literal["split", "reject", "truncate_left"] = "split"
    """What happens to a document of more than `max_length` tokens: cut into pieces, filtered out, or cut at the
    left (never inside a reply); each is counted."""
    stream: bool = False
    """Train while the rows are prepared; refused with transforms that compare all rows first."""
    max_quarantine: float = Field(default=0.01, ge=0, le=1)
    """Fraction of unreadable rows above which preparation stops."""
    cache_dir: str = Field(default_factory=lambda: str(Path("~/.cache/ftray/data").expanduser()))
    """Where prepared shards are kept: a folder all nodes share, or a URL (`s3://...`)."""
    node_cache_gb: float = Field(default=20.0, gt=0)
    """Disk of a node for copies of remote shards, in `TMPDIR`; a window or two should fit."""
    window_shards: int = Field(default=256, ge=1)
    """Shards (of 4 MiB of source each) in a window; rows are shuffled inside windows, windows come in order."""
    mixture: Annotated[list[MixtureEntry], BeforeValidator(_as_mixture)] = Field(default_factory=list)
    """Shares of the entries of `train` in training; empty: every row once an epoch."""
    drop_consumed: bool = False
    """Remove a window's shards once a checkpoint lies behind it; for a single pass over a large corpus."""

    def __post_init__(self) -> None:
        # Field default factories are not validated, so names given above become objects here.
        built = [Piece("transform").func(item) for item in self.transforms]  # type: ignore[call-arg]
        object.__setattr__(self, "transforms", built)
        stages = [is_read_time(item) for item in built]
        if stages != sorted(stages):
            early = built[stages.index(True)]
            name = catalog.name_of(type(early)) or type(early).__name__
            raise ConfigError(
                f"transforms: `{name}` is applied when prepared rows are read; put it behind those of preparation"
            )
        barriers = [
            catalog.name_of(type(item)) or type(item).__name__ for item in built if _looks_ahead(item)
        ]
        if not self.validation and any(_draws_validation(item) for item in built):
            object.__setattr__(self, "validation", list(self.train))
        if self.stream and self.mixture:
            raise ConfigError("stream: a mixture draws from every source at once; prepare all rows first")
        if self.drop_consumed and self.mixture:
            raise ConfigError("drop_consumed: a mixture comes back to every source; leave one of them out")
        if self.stream and barriers:
            raise ConfigError(
                f"stream: `{'`, `'.join(barriers)}` must see all rows before the first is trained on; "
                "leave out the transform, or set `stream: false`"
            )

    @property
    def prepare_transforms(self) -> list[Any]:
        """The transforms of preparation."""
        return [item for item in self.transforms if not is_read_time(item)]

    @property
    def read_transforms(self) -> list[Any]:
        """The transforms of packed rows when they are read."""
        return [item for item in self.transforms if is_read_time(item)]


@spec
class Recipe:
    """One training run."""

    name: str
    """The run's name: lower-case letters, digits, `.`, `_`, `-`."""
    output_dir: str = "runs"
    """The run's folder is `output_dir/name`."""
    seed: int = Field(default=0, ge=0)
    """Seeds the data order, adapter initialisation and dropout."""
    model: ModelConfig
    data: DataConfig
    adapt: Annotated[Any, Piece("adapt")]
    """What trains."""
    objective: Annotated[Any, Piece("objective", optional=True)] = None
    """What is minimised."""
    optim: Annotated[Any, Piece("optim", optional=True)] = None
    """How a step is taken."""
    lr_scheduler: Annotated[Any, Piece("lr_scheduler", optional=True)] = None
    """Learning rate over the run."""
    strategy: Annotated[Any, Piece("strategy")]
    """How the work is spread."""
    train: TrainConfig
    tracking: Annotated[list[Annotated[Any, Piece("tracker")]], BeforeValidator(_as_list)] = Field(
        default_factory=list
    )
    """Where metrics go besides the JSON lines and TensorBoard files that are always written."""
    trainer: Annotated[Any, Piece("trainer", optional=True)] = None
    """A trainer of somebody else's in place of ours; it brings objective, optimiser and schedule along."""

    def require_own_loop(self, what: str) -> None:
        """Raise `ConfigError` if a trainer that is not ours is to run this, since `what` knows our loop only."""
        if self.trainer is not None:
            raise ConfigError(f"trainer: {what} knows our own loop only; remove it")

    def __post_init__(self) -> None:
        for field in ("objective", "optim", "lr_scheduler"):
            if self.trainer is None and getattr(self, field) is None:
                raise ConfigError(f"{field}: missing; give it a value")
            if self.trainer is not None and getattr(self, field) is not None:
                name = catalog.name_of(type(self.trainer)) or type(self.trainer).__name__
                raise ConfigError(f"{field}: `{name}` brings one of its own along; remove it")
        if self.trainer is not None and self.train.max_steps is None and self.train.num_train_epochs is None:
            raise ConfigError(
                "train.max_steps: missing; a `trainer` heeds `max_steps` and `num_train_epochs` only"
            )
        if self.data.stream and self.train.num_train_epochs is not None:
            raise ConfigError(
                "train.num_train_epochs: with `data.stream` the number of rows is not known; set `max_steps`"
            )
        if self.data.drop_consumed and self.train.save_steps is None:
            raise ConfigError(
                "data.drop_consumed: windows are dropped once a checkpoint lies behind them; set `train.save_steps`"
            )
        if not is_name(self.name):
            raise ConfigError(
                f"name: {self.name!r} is refused; use lower-case letters, digits, `.`, `_`, `-`"
            )
        if self.train.early_stopping_patience is not None and not self.data.validation:
            raise ConfigError(
                "train.early_stopping_patience: there are no rows to validate on; set `data.validation`"
            )
        check_facts(
            {field: getattr(self, field) for field in ("strategy", "adapt", "objective", "optim", "train")}
        )
