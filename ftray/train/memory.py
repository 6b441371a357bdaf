"""What a step of a recipe holds in memory, by running it on tensors that have shapes but no storage.

The real model, objective and optimiser run one optimiser step under `FakeTensorMode`, and every tensor that an
operation makes is counted from its birth to its end. So the count follows from the structure: what a layer saves
for its backward pass, what checkpointing saves again, what bfloat16 narrows, what a frozen base need not keep.
Nothing is allocated and nothing is computed.
"""

import copy
import dataclasses
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ftray.config.recipe import ModelConfig, Recipe
from ftray.core.errors import ModelError
from ftray.data.batch import Batch
from ftray.model.build import build_structure
from ftray.model.layers import find_layers
from ftray.model.policy import Policy
from ftray.model.precision import autocast
from ftray.train.build import build_optimizers, structure_of


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment of a step; as counted, on one process that holds the whole model."""

    weights: int
    """Parameters and buffers, trained or frozen, a reference or a teacher included."""
    trained: int
    """The part of `weights` that trains."""
    gradients: int
    """Gradients there are at that moment."""
    optimizer: int
    """State of the optimisers, and averages of the weights."""
    logits: int
    """Pieces of the vocabulary's width that one chunk of the loss needs."""
    activations: int
    """All else: what layers save for the backward pass, and what operations need for a moment."""
    peak: int
    """All together."""
    masters: int
    """A float32 copy of what trains, for strategies that keep one."""
    state: int
    """State of the optimisers of all that trains, on however many ranks."""
    gathered: int
    """Whole weights that a strategy with sharded ones holds for a moment: what lies outside the layers, the layer
    that computes and the next one."""


class _Count(TorchDispatchMode):
    """Counts the storages alive that operations inside the block have made."""

    def __init__(self, vocab_size: int, num_targets: int, trained: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self._vocab_size, self._num_targets, self._trained = vocab_size, num_targets, trained
        self._bytes: dict[int, tuple[int, bool]] = {}
        self.live = self.live_logits = 0
        self.peak = self.peak_logits = self.peak_gradients = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():  # lengths of documents: values that decide about shapes
                return func(*args, **(kwargs or {}))
        # What depends on values has none to depend on: targets are counted beforehand, decisions are `yes`.
        if func is torch.ops.aten.nonzero.default:
            size = min(self._num_targets, args[0].numel())
            out: Any = torch.empty(size, args[0].ndim, dtype=torch.int64, device=args[0].device)
        elif func is torch.ops.aten._local_scalar_dense.default:
            return 1
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage: Any = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return
        is_logits = tensor.ndim >= 2 and tensor.shape[-1] == self._vocab_size
        self._bytes[key] = storage.nbytes(), is_logits
        weakref.finalize(storage, self._remove, key)
        self.live += storage.nbytes()
        self.live_logits += storage.nbytes() * is_logits
        if self.live > self.peak:
            self.peak, self.peak_logits = self.live, self.live_logits
            self.peak_gradients = sum(p.grad.nbytes for p in self._trained if p.grad is not None)

    def _remove(self, key: int) -> None:
        size, is_logits = self._bytes.pop(key, (0, False))
        self.live -= size
        self.live_logits -= size * is_logits


def step_memory(
    recipe: Recipe, *, num_tokens: int, num_targets: int, bf16: bool, accumulates: bool
) -> Memory:
    """Memory of one optimiser step after the first.

    Args:
        recipe: the run.
        num_tokens: tokens of a micro batch.
        num_targets: targets among them.
        bf16: computed in bfloat16.
        accumulates: there is more than one micro batch in a step.
    """
    model = structure_of(recipe, empty=True).train()
    batch = _batch(recipe, num_tokens)
    trained: list[torch.nn.Parameter] = []
    count = _Count(model.config.get_text_config().vocab_size, num_targets, trained)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), count:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # they are all null
        _give_shapes(model)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trained.extend(named.values())
        optimizers = build_optimizers(recipe, named)
        policy = Policy(model, **_companions(recipe, model))
        weights, gathered = count.live, _gathered_bytes(model)
        _update(trained, optimizers, fill=True)
        state = _state_bytes(optimizers)
        for _ in range(2 if accumulates else 1):
            _forward_backward(recipe, policy, batch, bf16)
        _update(trained, optimizers)
    gradients, logits, peak = count.peak_gradients, count.peak_logits, count.peak
    return Memory(
        weights=weights,
        trained=sum(parameter.nbytes for parameter in trained),
        gradients=gradients,
        optimizer=state,
        logits=logits,
        activations=peak - weights - gradients - state - logits,
        peak=peak,
        masters=sum(4 * parameter.numel() for parameter in trained),
        state=state,
        gathered=gathered,
    )


def _give_shapes(model: Any) -> None:
    """Put tensors without storage, of the CPU in name, in the place of parameters and buffers."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    data = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    known[id(parameter)] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _companions(recipe: Recipe, model: Any) -> dict[str, Any]:
    """Frozen models beside the one that trains."""
    found: dict[str, Any] = {}
    if recipe.objective.needs_reference and not recipe.adapt.facts().detachable:
        found["reference"] = copy.deepcopy(model).requires_grad_(False)
    if teacher := recipe.objective.teacher_model:
        config = ModelConfig(model_name_or_path=teacher, dtype=recipe.model.dtype)
        found["teacher"] = build_structure(config, empty=True)
        _give_shapes(found["teacher"])
    return found


def _batch(recipe: Recipe, num_tokens: int) -> Batch:
    """As many rows as a micro batch has, as even as may be; two documents in each if they are pairs."""
    rows = recipe.train.per_device_train_batch_size
    per_group = 2 if recipe.objective.pairs else 1
    bounds = torch.linspace(0, num_tokens, rows * per_group + 1).round().to(torch.int32)
    ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        labels=ids,
        weights=torch.ones(1, num_tokens),
        position_ids=ids,
        cu_seq_lens=bounds,
        group_lens=torch.full((rows,), per_group, dtype=torch.int32),
        row_ids=torch.zeros(rows, dtype=torch.int64),
    )


def _forward_backward(recipe: Recipe, policy: Policy, batch: Batch, bf16: bool) -> None:
    # Lengths of documents are read by the attention, so they stay values; all else has only shapes.
    fake = {"input_ids", "labels", "weights", "position_ids"}
    known = {name: getattr(batch, name) for name in fake}
    shaped = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in known.items()}
    with autocast(bf16):
        terms = recipe.objective.sums(policy, dataclasses.replace(batch, **shaped))
    torch.stack([term.float() for term in terms.values() if term.requires_grad]).sum().backward()


def _gathered_bytes(model: Any) -> int:
    total = sum(parameter.nbytes for parameter in model.parameters())
    try:
        layers = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in find_layers(model)]
    except ModelError:  # it cannot be sharded, so nothing is gathered
        return total
    return total - sum(layers) + 2 * max(layers, default=0)


def _update(parameters: list[torch.nn.Parameter], optimizers: list[Any], fill: bool = False) -> None:
    for parameter in parameters:
        if fill:
            parameter.grad = torch.empty_like(parameter)
    torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _state_bytes(optimizers: list[Any]) -> int:
    tensors = (
        value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()
    )
    return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
