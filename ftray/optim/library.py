"""Optimisers of `torch.optim` by their names there."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.optim.groups import ParamGroup, check_patterns, parameter_groups

# They need a closure, sparse gradients, or have a piece of their own here.
_NOT_OFFERED = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}


@spec
class TorchOptimizer:
    """Any first-order optimiser of `torch.optim`: Adafactor, Adagrad, NAdam, RAdam, RMSprop, SGD and others."""

    optimizer: str
    """Its class in `torch.optim`, for example `NAdam`."""
    learning_rate: float = Field(gt=0)
    """Base learning rate; the schedule multiplies it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices, in the optimiser's own sense; norms, biases and other vectors are not decayed."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Its other arguments, as `{momentum: 0.9, nesterov: true}`."""
    param_groups: list[ParamGroup] = Field(default_factory=list)
    """Learning rates and decays by name pattern."""

    def __post_init__(self) -> None:
        known = offered()
        if self.optimizer not in known:
            folded = {name.lower(): name for name in known}
            near = difflib.get_close_matches(self.optimizer.lower(), folded, n=1)
            hint = f"did you mean `{folded[near[0]]}`?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"optimizer: {self.optimizer!r} is not an optimiser of torch.optim; {hint}")
        taken = set(inspect.signature(known[self.optimizer]).parameters) - {"params", "lr", "weight_decay"}
        if odd := sorted(set(self.settings) - taken):
            raise ConfigError(
                f"settings.{odd[0]}: {self.optimizer} has no such argument; it has {', '.join(sorted(taken))}"
            )
        if self.weight_decay and "weight_decay" not in inspect.signature(known[self.optimizer]).parameters:
            raise ConfigError(
                f"weight_decay: {self.weight_decay} is refused; {self.optimizer} has none, set it to 0"
            )
        try:
            self._make([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"settings: {self.optimizer} refuses them: {error}") from None

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        """One optimiser over the named parameters. Raises `ConfigError` for a pattern that matches none."""
        check_patterns(list(parameters), self.param_groups)
        groups = parameter_groups(parameters, self.learning_rate, self.weight_decay, self.param_groups)
        return [self._make(groups)]

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        # YAML has lists where the optimisers unpack tuples, which lists serve as well.
        return offered()[self.optimizer](groups, lr=self.learning_rate, **self.settings)


def offered() -> dict[str, Any]:
    """Name -> class of every optimiser of `torch.optim` that can be used."""
    return {
        name: found
        for name, found in vars(torch.optim).items()
        if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer) and name not in _NOT_OFFERED
    }
