"""Sharded parameters, gradients and optimiser state: PyTorch's FSDP2 (Zhao et al., arXiv:2304.11277).

Every layer is one group: gathered before it computes, dropped after. What lies outside the layers (embeddings,
the last norm, the head) is the root's group: it stays gathered from the forward pass until its gradients are
there, so a loss that reads the head's weight chunk by chunk sees the whole of it. What an adapter adds to the
base stays whole on every rank.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from ftray.core.spec import spec
from ftray.model.layers import find_layers
from ftray.model.shard import local, with_local
from ftray.strategy import pieces
from ftray.strategy.base import Optimizers, Parameters
from ftray.strategy.step import OwnStep
from ftray.strategy.workers import Workers, sum_flat


@spec
class FSDP(Workers, OwnStep):
    """Fully sharded data parallelism: each worker holds a part of every weight, gradient and moment.

    Gradients are summed, not averaged, since the losses are already divided by global counts.
    """

    lacks: ClassVar[Mapping[str, str]] = {"whole_matrices": "each worker holds a few rows of every matrix"}

    reshard_after_forward: bool = True
    """Drop a layer's whole weights after its forward pass and gather them again for its backward pass; false keeps
    them in between: faster, with the memory of the whole model."""
    cpu_offload: bool = False
    """Keep shards, gradients and optimiser state in CPU memory and step there; it changes nothing without GPUs."""

    @property
    def shards(self) -> frozenset[str]:
        """All there is of the base; what an adapter adds is whole."""
        return frozenset({"weights", "gradients", "optimizer"})

    @property
    def weights_device(self) -> torch.device:
        """The CPU if shards are offloaded."""
        return torch.device("cpu") if self.cpu_offload else self.device

    def prepare(self, model: Any, *, bf16: bool) -> Any:
        """Shard the base by layers; what an adapter has added is left whole.

        On a GPU a run in bfloat16 gathers bfloat16 weights and reduces float32 gradients; on CPUs autocast casts
        what was gathered in float32, as it does without sharding.
        """
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(self.device)
        mixed = MixedPrecisionPolicy()
        if is_cuda and bf16:
            mixed = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        added = {p for name, p in model.named_parameters() if name not in model.ftray_base_names}
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.dp_size,)),
            "mp_policy": mixed,
            "offload_policy": CPUOffloadPolicy() if self.cpu_offload and is_cuda else OffloadPolicy(),
            "ignored_params": added,
        }
        for layer in find_layers(model):
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **settings)
        fully_shard(model, **settings)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                # Without it, sums are made as averages times the world, which gloo cannot and bfloat16 should not.
                module.set_force_sum_reduction_for_comms(True)
        # GPT-2's hidden states are a view; nothing changes hidden states in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        # The objectives ask for hidden states, not for the model's own forward: let the root's hooks run there.
        model.ftray_trunk = model.base_model.__call__
        register_fsdp_forward_method(model, "ftray_trunk")
        return model

    def reduce(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients of what is whole; those of shards were summed in the backward passes."""
        whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
        for parameter, total in zip(whole, sum_flat(gradients), strict=True):
            parameter.grad = total

    def norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Shards of all ranks and whatever is whole, once: the same number on every rank."""
        shards = [local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        square = torch.nn.utils.get_total_norm(shards).double() ** 2
        rest = torch.nn.utils.get_total_norm(whole).double() ** 2
        return (self.sum(square) + rest.to(square.device)).sqrt().float()

    def snapshot(self, parameters: Parameters, optimizers: Optimizers, *, copy: bool = True) -> pieces.Pieces:
        """This rank's shards; rank 0 also has what is whole."""
        return pieces.take(
            parameters, optimizers, rank=dist.get_rank(), num_writers=dist.get_world_size(), copy=copy
        )

    def full_parameters(self, parameters: Parameters) -> Iterator[tuple[str, torch.Tensor]]:
        """Gathered one at a time."""
        for name, parameter in parameters.items():
            tensor = parameter.detach()
            if isinstance(tensor, DTensor):
                tensor = with_local(tensor, local(tensor).to(self.device)).full_tensor()
            yield name, tensor.cpu()
