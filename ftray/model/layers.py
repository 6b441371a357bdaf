"""The layers of a transformer, whatever its architecture calls them."""

from typing import Any

from torch import nn

from ftray.core.errors import ModelError


def find_layers(model: Any) -> list[nn.Module]:
    """The decoder layers, in order: the outermost list of `num_hidden_layers` modules.

    Raises:
        ModelError: if there is no such list.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ModelError(
        f"{type(model).__name__}: no list of {count} layers was found, so it cannot be sharded; use `strategy: ddp`"
    )
