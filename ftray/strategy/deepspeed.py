"""DeepSpeed's ZeRO: optimiser state, gradients and parameters divided over workers (arXiv:1910.02054)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.strategy import zero_pieces
from ftray.strategy.base import Follower, Optimizers, Parameters, Update
from ftray.strategy.pieces import Pieces
from ftray.strategy.workers import Workers
from ftray.strategy.zero import Zero, check_optimizers, load_deepspeed, require_deepspeed

_OURS = {"stage", "offload_optimizer", "offload_param"}


@spec
class DeepSpeed(Workers):
    """DeepSpeed's ZeRO stages 1 to 3, stepped by torch's own optimiser; needs `ftray[deepspeed]`.

    Its checkpoints are ours: any strategy, and any number of workers, goes on from them.
    """

    lacks: ClassVar[Mapping[str, str]] = {
        "whole_matrices": "each worker steps a range of elements that begins and ends inside matrices",
        "local_gradients": "gradients are reduced, clipped and consumed in one call of DeepSpeed's",
        "local_optimizer": "DeepSpeed owns the optimiser's step",
        "component_clipping": "the gradient is clipped as one",
    }

    zero_stage: Literal[1, 2, 3] = 2
    """What is divided over the workers: 1 optimiser state, 2 also gradients, 3 also parameters."""
    offload_optimizer_device: Literal["none", "cpu"] = "none"
    """Keep optimiser state in CPU memory and step there."""
    offload_param_device: Literal["none", "cpu"] = "none"
    """Keep parameters in CPU memory between uses (stage 3)."""
    zero_optimization: dict[str, Any] = Field(default_factory=dict)
    """Other settings of DeepSpeed's section of this name, as `{reduce_bucket_size: 50000000}`."""

    def __post_init__(self) -> None:
        if self.offload_param_device != "none" and self.zero_stage != 3:
            raise ConfigError(
                f"offload_param_device: `{self.offload_param_device}` needs zero_stage 3, not {self.zero_stage}"
            )
        if own := sorted(_OURS & self.zero_optimization.keys()):
            raise ConfigError(
                f"zero_optimization.{own[0]}: has a field of its own here; use zero_stage, "
                "offload_optimizer_device or offload_param_device"
            )

    @property
    def shards(self) -> frozenset[str]:
        """Stage 1 divides optimiser state and masters, stage 2 also gradients, stage 3 also weights."""
        return frozenset(("masters", "optimizer", "gradients", "weights")[: self.zero_stage + 1])

    def check_optimizers(self, optimizers: Optimizers) -> None:
        """One of `torch.optim`, that moves each element by its own gradient alone; and the library is there."""
        require_deepspeed()
        check_optimizers(optimizers)

    def settings(self) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization` section."""
        section: dict[str, Any] = {"stage": self.zero_stage, "memory_efficient_linear": False}
        # Without GPUs there is nothing to overlap with, and gathers on their way at the end would be left behind.
        if self.device.type == "cpu":
            section |= {"overlap_comm": False, "stage3_prefetch_bucket_size": 0}
        else:
            # Buckets that are reduced while the next are made belong to a boundary that is not known ahead.
            section["overlap_comm"] = self.zero_stage == 2
        for part in ("optimizer", "param"):
            if getattr(self, f"offload_{part}_device") == "cpu":
                section[f"offload_{part}"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return section | self.zero_optimization

    def prepare(self, model: Any, *, bf16: bool) -> Any:
        """Ready DeepSpeed for the model that trains; frozen ones beside it stay whole on every rank."""
        del bf16  # autocast computes in it; masters are float32
        if any(parameter.requires_grad for parameter in model.parameters()):
            library = load_deepspeed()
            # Frozen: what a spec says does not change, but a worker's engine has to be somewhere.
            object.__setattr__(
                self, "_zero", Zero(library, model, self.settings(), self.dp_size, self.dp_rank)
            )
        return model

    @property
    def zero(self) -> Zero:
        """The engine of this worker; there is none before `prepare`."""
        found: Zero = self.__dict__["_zero"]
        return found

    def keep_part(self, model: Any, parameter: torch.nn.Parameter) -> None:
        """In stage 3, this rank's range of it."""
        if model is self.zero.model:
            self.zero.partition(parameter)

    def attach(self, model: Any, optimizers: Optimizers) -> list[torch.optim.Optimizer]:
        """Hand both to DeepSpeed; averages are kept of its float32 masters."""
        del model
        optimizer = check_optimizers(optimizers)
        self.zero.start(optimizer)
        followers = [found for found in optimizers if isinstance(found, Follower)]
        masters = self.zero.masters, self.zero.states, self.zero.refresh
        return [optimizer, *(found.over(*masters) for found in followers)]

    def backward(self, loss: torch.Tensor) -> None:
        """Through DeepSpeed, which reduces gradients as they come (stages 2 and 3)."""
        self.zero.backward(loss)

    def update(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizers: Optimizers,
        max_grad_norm: float | None,
        *,
        sound: bool,
    ) -> Update:
        """DeepSpeed's step; what it does not apply, it drops on all ranks."""
        del parameters
        if not sound:
            self.zero.drop_gradients()
            return Update(grad_norm=math.nan, applied=False)
        norm, applied = self.zero.step(max_grad_norm)
        if applied:
            for follower in (found for found in optimizers if isinstance(found, Follower)):
                follower.step()
        return Update(grad_norm=norm, applied=applied)

    def snapshot(self, parameters: Parameters, optimizers: Optimizers, *, copy: bool = True) -> Pieces:
        """This rank's ranges of float32 parameters and moments."""
        del optimizers
        return zero_pieces.take(self.zero, parameters, copy=copy)

    def restore(
        self, folder: Path, manifest: Mapping[str, Any], parameters: Parameters, optimizers: Optimizers
    ) -> None:
        """Read a checkpoint of any world size, of any strategy that saves pieces."""
        del optimizers
        zero_pieces.restore(self.zero, folder, manifest, parameters)

    def full_parameters(self, parameters: Parameters) -> Iterator[tuple[str, torch.Tensor]]:
        """Gathered one at a time."""
        for name, parameter in parameters.items():
            with self.zero.whole(parameter) as tensor:
                value = tensor.to("cpu", copy=True)
            yield name, value
