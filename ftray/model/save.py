"""A model's folder written one tensor at a time, as `save_pretrained` would write it.

The headers come first, from the structure alone; then each tensor goes to its place as it comes. With sharded
weights that are gathered one by one, the peak is the shards and the largest tensor with what it is parted into.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ftray.core.fs import write_json
from ftray.model.convert import revert
from ftray.model.score import is_saved, saved_config
from ftray.model.shard import whole_shape
from ftray.model.tensor_file import Layout, TensorFile, num_bytes

MAX_FILE_BYTES = 5 * 10**9
"""Weights are spread over several files above this, as transformers did up to its fourth version."""


def save_model(model: Any, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write configuration and weights so that plain transformers loads them.

    Args:
        model: the structure; of its own tensors only shapes, types and persistent buffers are used.
        tensors: every parameter, whole, under its name in the model; taken to the end.
        folder: where to; made when needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, FSDPModule):
        model.reshard()  # what is gathered for computing may have another type
    _save_config(model, folder)
    parameters = {name: p for name, p in model.named_parameters() if is_saved(model, name)}
    buffers = _persistent_buffers(model)
    empty = (
        (name, torch.empty(whole_shape(p), dtype=p.dtype, device="meta")) for name, p in parameters.items()
    )
    plan = {
        key: (t.dtype, tuple(t.shape)) for key, t in revert(model, itertools.chain(empty, buffers.items()))
    }
    with contextlib.ExitStack() as stack:
        files: dict[str, TensorFile] = {}
        for name, layout in _named(_split(plan), folder):
            file = stack.enter_context(TensorFile(folder / name, layout))
            files |= dict.fromkeys(layout, file)
        saved = ((name, tensor) for name, tensor in tensors if name in parameters)
        for key, tensor in revert(model, itertools.chain(saved, buffers.items())):
            files[key].put(key, tensor)


def _save_config(model: Any, folder: Path) -> None:
    config = saved_config(model)
    config.dtype = next(model.parameters()).dtype
    config.use_cache = True  # it is off for training only
    # Sharding gives the model a class of its own, derived from the architecture's.
    cls = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    if config.architectures == model.config.architectures:
        config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _persistent_buffers(model: Any) -> dict[str, torch.Tensor]:
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in model.state_dict() if name in buffers}


def _split(plan: Layout) -> list[Layout]:
    """Tensors in their order, in as many files as their size asks for."""
    files: list[dict[str, Any]] = [{}]
    size = 0
    for key, (dtype, shape) in plan.items():
        length = num_bytes(dtype, shape)
        if files[-1] and size + length > MAX_FILE_BYTES:
            files.append({})
            size = 0
        files[-1][key] = (dtype, shape)
        size += length
    return list(files)


def _named(layouts: list[Layout], folder: Path) -> Iterator[tuple[str, Layout]]:
    """Files by transformers' names; writes the index if there are several."""
    if len(layouts) == 1:
        yield "model.safetensors", layouts[0]
        return
    weight_map: dict[str, str] = {}
    for number, layout in enumerate(layouts, 1):
        name = f"model-{number:05d}-of-{len(layouts):05d}.safetensors"
        weight_map |= dict.fromkeys(layout, name)
        yield name, layout
    total = sum(num_bytes(*entry) for layout in layouts for entry in layout.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
