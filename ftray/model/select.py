"""Names to modules: the linear layers a list of patterns means, strictly."""

import difflib
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ftray.core.errors import ConfigError

Targets = list[str] | Literal["all-linear"]


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every linear layer but the output head, by name (GPT-2's `Conv1D` is one), adapted ones too."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) or hasattr(module, "stands_for_linear"))
        and module is not head
    }


def select_linear(model: Any, targets: Targets | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers named by `targets`: whole names or their last parts (`q_proj`), or `all-linear`.

    Raises:
        ConfigError: if a target matches nothing; the message lists near misses.
    """
    layers = linear_layers(model)
    if targets == "all-linear":
        return layers
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        hits = {
            name: layer for name, layer in layers.items() if name == target or name.endswith("." + target)
        }
        if not hits:
            leaves = sorted({name.rpartition(".")[2] for name in layers})
            near = difflib.get_close_matches(target, leaves, n=3) or leaves
            raise ConfigError(
                f"adapt.target_modules: {target!r} matches no linear layer; near: {', '.join(near)}"
            )
        chosen |= hits
    return {name: layer for name, layer in layers.items() if name in chosen}


def expert_stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every stack of expert matrices by name, most of them `[E, out, in]`; empty for a dense model."""
    return {
        f"{owner}.{leaf}": parameter
        for owner, module in model.named_modules()
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding | _ConvNd | nn.ParameterDict)
        for leaf, parameter in module.named_parameters(recurse=False)
        if _is_stack(f"{owner}.{leaf}", parameter)
    }


def _is_stack(name: str, parameter: nn.Parameter) -> bool:
    # A few architectures lay the experts' matrices end to end in two axes; a plain layer's matrix is its `weight`.
    leaf = name.rpartition(".")[2]
    end_to_end = parameter.ndim == 2 and "expert" in name.lower() and leaf != "weight"
    return not leaf.endswith("bias") and (parameter.ndim == 3 or end_to_end)
