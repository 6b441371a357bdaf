"""What a run trained, held in memory for whoever goes on from it: a copy of it is an exploit without a file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftray.strategy.base import Optimizers, Parameters
from ftray.strategy.pieces import put_state, state_tensors
from ftray.train.checkpoint import State
from ftray.train.identity import check_identity


@dataclasses.dataclass(frozen=True)
class Resident:
    """The state that a committed checkpoint holds too, of parameters that are whole on every rank."""

    checkpoint: Path
    """The checkpoint that has the same."""
    parameters: Parameters
    optimizers: Optimizers
    state: State
    identity: Mapping[str, Any]
    """`run_identity` of the run that made it."""

    def copy_to(self, parameters: Parameters, optimizers: Optimizers, identity: Mapping[str, Any]) -> State:
        """Copy weights and optimiser state, as a restored checkpoint would; returns where its run stood.

        Raises:
            CheckpointError: if the run that goes on has another structure or other rows.
        """
        check_identity(self.checkpoint, self.identity, identity, False, False)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.parameters[name])
        held = state_tensors(self.parameters, self.optimizers)
        put_state(parameters, optimizers, ((name, tensor.clone()) for name, tensor in held.items()))
        return self.state
