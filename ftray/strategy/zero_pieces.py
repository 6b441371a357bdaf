"""Checkpoints of a model under DeepSpeed, in the pieces that every strategy reads and writes.

DeepSpeed's own checkpoints are pickles that load at the world size that wrote them. The float32 parameters and
the moments are ranges of flat buffers, so they are saved as pieces of the tensors they belong to instead.
"""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftray.strategy.base import Parameters
from ftray.strategy.flat import Part, boxes, read_range
from ftray.strategy.pieces import SEPARATOR, Pieces, Reader, copied, open_trainable
from ftray.strategy.zero import Zero

# The last snapshot of an engine and its whole ranges by name, as `ftray.strategy.pieces` keeps them.
_LAST: weakref.WeakKeyDictionary[Zero, tuple[Pieces, dict[str, torch.Tensor]]] = weakref.WeakKeyDictionary()


def take(zero: Zero, parameters: Parameters, *, copy: bool) -> Pieces:
    """This rank's pieces, in CPU memory; those of numbers (the step count) from rank 0.

    A copy takes the memory of the last one, once that is written.
    """
    last, old = _LAST.get(zero, (None, {}))
    spare = old if last is not None and last.written.is_set() else {}
    ranges: dict[str, torch.Tensor] = {}
    files: dict[str, dict[str, torch.Tensor]] = {"trainable": {}, "optimizer": {}}
    index: dict[str, dict[str, Any]] = {"trainable": {}, "optimizer": {}}

    def add(kind: str, name: str, part: Part, values: torch.Tensor) -> None:
        mine = part.of(values).detach()
        mine = ranges[name] = copied(mine, spare.get(name)) if copy else mine.cpu()
        for number, ((offset, shape), where) in enumerate(
            boxes(part.shape, part.start, part.start + part.numel)
        ):
            key = f"{name}#{number}"
            files[kind][key] = mine[where].reshape(shape)
            index[kind][key] = {"of": name, "shape": list(part.shape), "offset": list(offset)}

    for part in zero.parts(parameters):
        if part.numel:
            add("trainable", part.name, part, part.flat)
        for key, value in zero.state(part.flat).items():
            name = f"{part.name}{SEPARATOR}{key}"
            if isinstance(value, torch.Tensor) and value.shape == part.flat.shape:
                if part.numel:
                    add("optimizer", name, part, value)
            elif zero.rank == 0:
                is_tensor = isinstance(value, torch.Tensor)
                number = value if is_tensor else torch.tensor(value, dtype=torch.float64)
                files["optimizer"][name] = number.detach().to("cpu", copy=copy)
                index["optimizer"][name] = {"shape": [], "offset": []}
    taken = Pieces(zero.rank, zero.world, files, index)
    if copy:
        _LAST[zero] = taken, ranges
    return taken


@torch.no_grad()
def restore(zero: Zero, folder: Path, manifest: Mapping[str, Any], parameters: Parameters) -> None:
    """Load this rank's ranges from pieces that any strategy saved.

    Raises:
        CheckpointError: if it has another layout, or other tensors than train now.
    """
    parts = {part.name: part for part in zero.parts(parameters)}
    trainable = open_trainable(folder, manifest, {name: part.shape for name, part in parts.items()})
    for name, part in parts.items():
        values = read_range(trainable, name, part.shape, part.start, part.numel)
        part.of(part.flat).copy_(values)
    _restore_state(zero, Reader(folder, "optimizer", manifest["files"]), parts)
    zero.refresh()


def _restore_state(zero: Zero, saved: Reader, parts: Mapping[str, Part]) -> None:
    # Buffers that are there are filled again: DeepSpeed holds views of them.
    before = {id(part.flat): dict(zero.state(part.flat)) for part in parts.values()}
    for part in parts.values():
        zero.state(part.flat).clear()
    for name, shape in saved.shapes.items():
        parameter_name, _, key = name.rpartition(SEPARATOR)
        part = parts[parameter_name]
        state, old = zero.state(part.flat), before[id(part.flat)]
        if shape == part.shape:
            values = read_range(saved, name, shape, part.start, part.numel)
            if key not in state:
                fits = key in old and old[key].shape == part.flat.shape
                state[key] = old[key].zero_() if fits else torch.zeros_like(part.flat, dtype=values.dtype)
            part.of(state[key]).copy_(values)
        else:
            # One for a whole buffer: a parameter that has seen fewer steps has seen none.
            number = saved.read(name).to(part.flat.device)
            state[key] = torch.maximum(state.get(key, number), number)
