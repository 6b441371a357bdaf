"""Which parameters share a learning rate and a weight decay."""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch.distributed.tensor import DTensor

from ftray.core.errors import ConfigError
from ftray.core.spec import spec

# Names that transformers' Trainer excludes from weight decay (`Trainer.get_decay_parameter_names`).
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@spec
class ParamGroup:
    """Parameters with settings of their own; what is not set is the optimiser's."""

    pattern: str = Field(min_length=1)
    """Glob over parameter names, as `*.lora_B.*` or `model.layers.0.*`; the first pattern that matches counts."""
    learning_rate: float | None = Field(default=None, ge=0)
    """Base learning rate; the schedule multiplies it as it does the others."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay, also of norms and biases if the pattern matches them."""


def is_decayed(name: str, parameter: torch.nn.Parameter) -> bool:
    """True for what weight decay applies to: not to norms, biases or any other vector."""
    # ZeRO-3 leaves a flat shard in a parameter's place and its real shape beside it.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and not _NOT_DECAYED.search(name)


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    rules: Sequence[ParamGroup] = (),
) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay, as PyTorch's optimisers take them.

    Each group has `params`, `lr` and `weight_decay`; the order is that of the names and the same on every rank.
    """
    groups: dict[tuple[float, float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rule = next((rule for rule in rules if fnmatch.fnmatchcase(name, rule.pattern)), None)
        rate, decay = learning_rate, weight_decay if is_decayed(name, parameter) else 0.0
        if rule is not None:
            rate = rate if rule.learning_rate is None else rule.learning_rate
            decay = decay if rule.weight_decay is None else rule.weight_decay
        # A fused kernel takes shards or whole tensors, not both: a head beside a sharded base is whole.
        groups.setdefault((rate, decay, isinstance(parameter, DTensor)), []).append(parameter)
    return [
        {"params": found, "lr": rate, "weight_decay": decay} for (rate, decay, _), found in groups.items()
    ]


def check_patterns(names: Sequence[str], rules: Sequence[ParamGroup]) -> None:
    """Raise `ConfigError`, with near names, for a pattern that is the first match of no parameter."""
    left = list(names)
    for number, rule in enumerate(rules):
        hits = set(_match(left, rule.pattern))
        if not hits:
            found = _match(names, rule.pattern)
            why = (
                "an earlier pattern takes all it matches" if found else f"near: {_near(rule.pattern, names)}"
            )
            field = f"optim.param_groups.{number}.pattern"
            raise ConfigError(f"{field}: {rule.pattern!r} matches no parameter that trains; {why}")
        left = [name for name in left if name not in hits]


def _match(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _near(pattern: str, names: Sequence[str]) -> str:
    bare = pattern.replace("*", "").strip(".")
    near = difflib.get_close_matches(bare, names, n=3, cutoff=0.3) or list(names[:3])
    return ", ".join(near)


def fuses(parameters: Sequence[torch.nn.Parameter]) -> bool:
    """True where PyTorch has a fused kernel for all of them."""
    return all(p.device.type in ("cpu", "cuda") and torch.is_floating_point(p) for p in parameters)
