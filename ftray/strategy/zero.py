"""DeepSpeed's engine around one model: how it is told what we do ourselves, and where it keeps things.

What it would do by itself and must not: build native code (no operation of it is needed here), average
gradients (losses are divided by global counts already), count micro batches, call the optimiser's CPU version,
log at every turn.
"""

import contextlib
import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ftray.core.errors import ConfigError
from ftray.strategy.base import Follower, Parameters
from ftray.strategy.flat import Part

# Each element is moved by its own gradient alone, so a flat range of elements can be stepped in place of matrices.
_ELEMENTWISE = ("Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
# Stages 1 and 2 copy a group of parameters into one buffer; groups of this size bound the copy.
_GROUP_ELEMENTS = 1 << 26


def require_deepspeed() -> None:
    """Raise `ConfigError` if the library is not installed; it is looked for and not imported."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "strategy: deepspeed is not installed; install torch, setuptools, wheel and ninja, then "
            "`pip install --no-build-isolation 'ftray[deepspeed]'`"
        )


def load_deepspeed() -> ModuleType:
    """The library, quiet and without native code. Raises `ConfigError` if it is not to be had."""
    require_deepspeed()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if dist.is_initialized():  # elsewhere it would tell other libraries that this is a rank
        os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"strategy: deepspeed does not load ({error}); install it anew") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # It would compile a shared-memory all-reduce, inside the worker, that only its inference uses.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The one optimiser that DeepSpeed is to step. Raises `ConfigError` if it cannot."""
    optimizers = [optimizer for optimizer in optimizers if not isinstance(optimizer, Follower)]
    found = [type(optimizer).__name__ for optimizer in optimizers]
    if len(optimizers) != 1 or type(optimizers[0]).__module__.split(".")[:2] != ["torch", "optim"]:
        reason = f"steps one optimiser of torch.optim, not {' and '.join(found)}"
    elif found[0] not in _ELEMENTWISE:
        reason = f"steps flat ranges of elements, which {found[0]} cannot take"
    else:
        return optimizers[0]
    raise ConfigError(
        f"strategy: `deepspeed` {reason}; use one of {', '.join(_ELEMENTWISE)}, or another strategy"
    )


def split_groups(optimizer: torch.optim.Optimizer, elements: int = _GROUP_ELEMENTS) -> None:
    """Part an optimiser's groups so that none has many more elements than this; settings stay what they are."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        taken: list[nn.Parameter] = []
        for parameter in group["params"]:
            if taken and sum(p.numel() for p in taken) + parameter.numel() > elements:
                groups.append({"params": taken, **settings})
                taken = []
            taken.append(parameter)
        groups.append({"params": taken, **settings})
    optimizer.param_groups[:] = groups


class Zero:
    """A model under DeepSpeed.

    Args:
        deepspeed: the library.
        model: what trains; on meta or loaded.
        settings: DeepSpeed's `zero_optimization` section.
        world: data-parallel ranks.
        rank: this one's number.
    """

    def __init__(
        self, deepspeed: ModuleType, model: Any, settings: Mapping[str, Any], world: int, rank: int
    ) -> None:
        self.deepspeed, self.model, self.world, self.rank = deepspeed, model, world, rank
        self.config = {
            # Its own counting of batches is off; these only have to be consistent.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "zero_optimization": dict(settings),
        }
        self.stage = int(settings["stage"])
        self._init = deepspeed.zero.Init(config_dict_or_path=self.config) if self.stage == 3 else None

    def partition(self, parameter: nn.Parameter) -> None:
        """Keep this rank's range of a whole parameter only (stage 3)."""
        if self._init is not None and not hasattr(parameter, "ds_id"):
            self._init._convert_to_deepspeed_param(parameter)
            parameter.partition()  # type: ignore[attr-defined]

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Build the engine; parameters are sharded or copied into its buffers."""
        model = self.model
        if self.stage == 3:
            for parameter in model.parameters():  # an adapter's factors, or random weights
                self.partition(parameter)
        else:
            split_groups(optimizer)
        self.engine, *_ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.config, dist_init_required=False
        )
        self.optimizer = self.engine.optimizer
        if self.optimizer.dtype == torch.bfloat16:  # else it would take a step that is not finite
            self.optimizer.check_grad_overflow = True
        if self.stage == 3:
            self._keep_whole(
                [p for name, p in model.named_parameters() if name not in model.ftray_base_names]
            )
        model.ftray_trunk = self._trunk

    def _keep_whole(self, added: Sequence[Any]) -> None:
        """Never drop what an adapter has added: it is small, and used outside the modules that hold it."""
        persistent = self.optimizer.persistent_parameters
        known = {id(parameter) for parameter in persistent}
        for parameter in added:
            parameter.ds_persist = True
            if id(parameter) not in known:
                persistent.append(parameter)
            parameter.all_gather()

    def _trunk(self, **inputs: Any) -> Any:
        """The base model's forward pass, as the engine would do it.

        The objectives ask for hidden states and read the head's weight by themselves, so in stage 3 it is gathered
        here; DeepSpeed drops it with the others before the step.
        """
        self.optimizer.clear_backward_seen_flag()
        if self.stage != 3:
            return self.model.base_model(**inputs)
        coordinator = self.optimizer._get_param_coordinator()
        coordinator.reset_step()
        output = self.model.base_model(**inputs)
        if not torch.is_grad_enabled():
            coordinator.reset_step()  # nothing that was fetched ahead for a backward pass stays on its way
        for weight in self._head_weights():
            weight.all_gather()
        return output

    def _head_weights(self) -> list[Any]:
        head = self.model.get_output_embeddings()
        return [] if head is None else list(head.parameters(recurse=False))

    def backward(self, loss: torch.Tensor) -> None:
        """Add gradients. DeepSpeed divides by the world size, which is undone here: ours are summed."""
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, max_grad_norm: float | None) -> tuple[float, bool]:
        """Reduce, clip and step.

        Returns:
            The norm before clipping, and whether anything moved: the same on all ranks.
        """
        self.optimizer.clip_grad = max_grad_norm or 0.0
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), not self.optimizer.overflow

    def drop_gradients(self) -> None:
        """Clear all gradients and move nothing: a step whose norm is invalid, which DeepSpeed gives up."""
        invalid = torch.tensor(-1.0, device=self.engine.device)
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        setattr(self.optimizer, name, lambda: [invalid] if self.stage == 3 else invalid)
        try:
            self.engine.step()
        finally:
            delattr(self.optimizer, name)

    @contextlib.contextmanager
    def whole(self, parameter: Any) -> Iterator[torch.Tensor]:
        """A parameter's whole value; every rank must enter and leave."""
        was_there = self.stage != 3 or parameter.ds_status.name == "AVAILABLE"
        if not was_there:
            parameter.all_gather()
        yield parameter.detach()
        if not was_there:
            parameter.partition()

    def parts(self, parameters: Parameters) -> Iterator[Part]:
        """Where this rank's range of each trained parameter lies in the float32 buffers."""
        for name, parameter in parameters.items():
            yield self._range(name, parameter) if self.stage == 3 else self._fragment(name, parameter)

    def _range(self, name: str, parameter: Any) -> Part:
        group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = min(self.rank * size, parameter.ds_numel)
        shape, flat = tuple(parameter.ds_shape), self.optimizer.fp32_partitioned_groups_flat[group]
        return Part(name, shape, start, flat, offset, min(size, parameter.ds_numel - start))

    def _fragment(self, name: str, parameter: Any) -> Part:
        buffers = self.optimizer.single_partition_of_fp32_groups
        where = parameter._hp_mapping
        if where is None:  # other ranks have all of it; its group's buffer says at which step it is
            groups = self.optimizer.bit16_groups
            group = next(n for n, found in enumerate(groups) if any(p is parameter for p in found))
            return Part(name, tuple(parameter.shape), 0, buffers[group], 0, 0)
        here, there = where.lp_fragment_address, where.hp_fragment_address
        shape = tuple(parameter.shape)
        # A range that wraps the padding of a group's end counts only what the parameter has.
        numel = min(here.numel, math.prod(shape) - here.start)
        return Part(name, shape, here.start, buffers[where.param_group_index], there.start, numel)

    @property
    def masters(self) -> list[torch.Tensor]:
        """The float32 buffers that are stepped."""
        kind = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizer, kind))

    @property
    def states(self) -> Any:
        """The optimiser's state by buffer, to read and to fill."""
        return self.optimizer.optimizer.state

    def state(self, flat: torch.Tensor) -> dict[str, Any]:
        """The optimiser's state of a buffer."""
        found: dict[str, Any] = self.states[flat]
        return found

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the model up to date with the float32 buffers."""
        if self.stage != 3:
            self.optimizer.update_lp_params()
            return
        self.optimizer._partition_all_parameters()
        for group, flat in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            self.optimizer.fp16_partitioned_groups_flat[group].copy_(flat)
            self.optimizer._unflatten_partitioned_parameters(group)
        if persistent := self.optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)
