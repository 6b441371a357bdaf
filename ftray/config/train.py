"""The `train` section of a recipe."""

from typing import Literal

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec


@spec
class TrainConfig:
    """How long to train, in what batches, and when to save."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps."""
    num_train_epochs: float | None = Field(default=None, gt=0)
    """Passes over the data, instead of `max_steps`."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens trained on, instead of `max_steps`: the run ends with the step that reaches them."""
    max_time_s: float | None = Field(default=None, gt=0)
    """Seconds of training after which the run ends; the schedule follows whichever limit is nearer."""
    global_batch_size: int = Field(default=16, ge=1)
    """Rows in one optimiser step, over all workers. The data order depends on it and on nothing else."""
    per_device_train_batch_size: int = Field(default=4, ge=1)
    """Rows in one forward pass; accumulation follows from it."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradient norm above which gradients are scaled down; null: never."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16 with float32 master weights; `auto`: where a short timing says it is faster."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between validation losses; null: at the end only."""
    save_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: at the end only."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    logging_steps: int = Field(default=1, ge=1)
    """Steps between logged metrics."""
    save_best: bool = False
    """Also commit a checkpoint at each lowest validation loss, and keep the best."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, more time."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Also keep an exponential moving average of what trains, with this weight of the past; null: none."""
    publish_ema: bool = True
    """With `ema_decay`: validate and publish the averaged weights; false: those of the last step."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Validations in a row without gain after which the run ends; null: never. Needs `eval_steps`."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """How much lower than the best so far `eval_loss` must be to count as a gain."""
    profile_steps: int | None = Field(default=None, ge=1)
    """Steps that every rank writes a torch trace of, after two others; null: none (`ftray run --profile`: 3)."""
    nan_policy: Literal["stop", "skip", "roll_back"] = "stop"
    """When the loss or the gradient is not finite on any rank: end the run, skip that update, or go back to the
    newest checkpoint and on with the rows after the bad ones."""
    max_rollbacks: int = Field(default=3, ge=1)
    """Times a run may go back before it ends."""
    watchdog_s: float | None = Field(default=600.0, gt=0)
    """Seconds a step may take before its process counts as hung, has its stacks saved and is ended; null: for
    ever."""
    watchdog_slow_s: float = Field(default=3600.0, gt=0)
    """The same for what is no step: the first one of a process, validation, a checkpoint, the end."""
    elastic_interval_s: float = Field(default=60.0, gt=0)
    """With `num_workers: [least, most]`: seconds between looks at the room there is."""

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in ("max_steps", "num_train_epochs", "max_tokens")}
        given = [name for name, value in lengths.items() if value is not None]
        if not given and self.max_time_s is None:
            raise ConfigError(f"max_steps: missing; set one of {', '.join(lengths)}, max_time_s")
        if len(given) > 1:
            raise ConfigError(f"{given[1]}: also `{given[0]}` is set; keep one of the two")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ConfigError(
                "early_stopping_patience: nothing is validated while training; set `eval_steps`"
            )
        if self.save_best and self.eval_steps is None:
            raise ConfigError("save_best: needs validation losses while training; set `eval_steps`")
