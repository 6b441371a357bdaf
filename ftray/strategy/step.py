"""The update of strategies whose optimisers are ours to call: reduce, measure, clip, step, clear."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftray.model.shard import local
from ftray.strategy import pieces
from ftray.strategy.base import Optimizers, Parameters, Update


class OwnStep:
    """What single, replicated and sharded data parallelism share; they differ in how gradients are reduced."""

    @property
    def shards(self) -> frozenset[str]:
        """Nothing is divided."""
        return frozenset()

    def check_optimizers(self, optimizers: Optimizers) -> None:
        """Any will do: their steps are called as they are."""

    def keep_part(self, model: Any, parameter: torch.nn.Parameter) -> None:
        """All of it stays."""

    def attach(self, model: Any, optimizers: Optimizers) -> list[torch.optim.Optimizer]:
        """The optimisers as they are."""
        del model
        return list(optimizers)

    def backward(self, loss: torch.Tensor) -> None:
        """Plain backward; what the ranks have left to exchange is exchanged in `update`."""
        loss.backward()

    def reduce(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over ranks."""

    def norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Norm of the whole gradient, the same number on every rank."""
        return torch.nn.utils.get_total_norm(gradients)

    def update(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizers: Optimizers,
        max_grad_norm: float | None,
        *,
        sound: bool,
    ) -> Update:
        """Reduce, clip by the global norm and step, unless the gradient is not finite.

        Every rank sees the same norm and takes the same decision: a gradient that is not finite on one rank is
        not finite on any, and moves nothing.
        """
        self.reduce(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = self.norm(gradients)
        applied = sound and bool(torch.isfinite(norm))
        if applied:
            if max_grad_norm is not None and gradients:
                factor = torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)
                parts = [local(gradient) for gradient in gradients]
                for device in {part.device for part in parts}:
                    there = [part for part in parts if part.device == device]
                    torch._foreach_mul_(there, factor.to(device))
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        return Update(grad_norm=float(norm), applied=applied)

    def restore(
        self, folder: Path, manifest: Mapping[str, Any], parameters: Parameters, optimizers: Optimizers
    ) -> None:
        """Read a checkpoint of any world size, of any strategy that saves pieces."""
        pieces.restore(folder, manifest, parameters, optimizers)

    def full_parameters(self, parameters: Parameters) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters themselves, one at a time."""
        for name, parameter in parameters.items():
            yield name, parameter.detach().cpu()
