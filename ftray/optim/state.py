"""Optimiser state as named tensors, so that it is saved without pickle and copied member to member."""

from collections.abc import Mapping, Sequence

import torch

_SEPARATOR = "::"


def state_tensors(
    parameters: Mapping[str, torch.nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """State of every optimiser as `parameter name::state key` -> tensor (plain numbers as 0-d float64)."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensor = (
                    value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
                )
                tensors[f"{names[id(parameter)]}{_SEPARATOR}{key}"] = tensor.detach()
    return tensors


def load_state_tensors(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put back what `state_tensors` gave. Raises KeyError for a parameter that is not there."""
    owner = {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition(_SEPARATOR)
        parameter = parameters[parameter_name]
        owner[id(parameter)].state[parameter][key] = tensor.clone()
