"""Trainable state as pieces of tensors: saved by any number of ranks, read by any other number.

Each writer has two safetensors files, `trainable-<k>-of-<n>` and `optimizer-<k>-of-<n>`. Their headers say
where in its whole tensor each piece lies, so a reader takes from all files what overlaps its own part. Sharded
tensors come from every rank, replicated ones from rank 0. Nothing is pickled.
"""

import dataclasses
import json
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from ftray.core.errors import CheckpointError
from ftray.model.shard import Region, local, region, with_local
from ftray.model.tensor_file import write_tensors
from ftray.strategy.base import Optimizers, Parameters

LAYOUT = "pieces"
_INDEX = "pieces"
SEPARATOR = "::"
"""Between a parameter's name and the name of a part of its optimiser's state."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A `Snapshot` of plain and sharded tensors."""

    layout: ClassVar[str] = LAYOUT
    rank: int
    num_writers: int
    files: Mapping[str, Mapping[str, torch.Tensor]]
    """Kind of file -> this rank's pieces by name."""
    index: Mapping[str, Mapping[str, Any]]
    """Kind of file -> whole shape and offset of each piece."""
    written: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set when the pieces are needed no more."""

    def write(self, folder: Path) -> list[str]:
        """See `Snapshot.write`."""
        names = []
        try:
            for kind, tensors in self.files.items() if self.rank < self.num_writers else ():
                names.append(f"{kind}-{self.rank}-of-{self.num_writers}.safetensors")
                write_tensors(folder / names[-1], tensors, {_INDEX: json.dumps(self.index[kind])})
        finally:
            self.written.set()
        return names


# The last snapshot of an optimiser, whose memory the next one uses again: fresh memory costs a page fault for
# every 4 KiB, which took most of the time of a copy. It goes with the optimiser.
_LAST: weakref.WeakKeyDictionary[torch.optim.Optimizer, Pieces] = weakref.WeakKeyDictionary()


def take(
    parameters: Parameters, optimizers: Optimizers, *, rank: int, num_writers: int, copy: bool
) -> Pieces:
    """This rank's pieces of parameters and optimiser state, in CPU memory.

    Args:
        parameters: what trains, by name.
        optimizers: built from the same parameters.
        rank: this writer's number; above `num_writers` it takes nothing.
        num_writers: ranks that write.
        copy: never share memory with the live tensors.
    """
    kinds: dict[str, Mapping[str, torch.Tensor]] = {
        "trainable": parameters,
        "optimizer": state_tensors(parameters, optimizers),
    }
    last = _LAST.get(optimizers[0]) if optimizers else None
    spare = last.files if last is not None and last.written.is_set() else {}
    files: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
    index: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for kind, tensors in kinds.items() if rank < num_writers else ():
        for name, tensor in tensors.items():
            offset, shape = region(tensor)
            if 0 not in shape if isinstance(tensor, DTensor) else rank == 0:
                part = local(tensor.detach())
                files[kind][name] = (
                    copied(part, spare.get(kind, {}).get(name)) if copy else part.cpu().contiguous()
                )
                index[kind][name] = {"shape": list(tensor.shape), "offset": list(offset)}
    taken = Pieces(rank, num_writers, files, index)
    if copy and optimizers:
        _LAST[optimizers[0]] = taken
    return taken


def copied(part: torch.Tensor, spare: torch.Tensor | None) -> torch.Tensor:
    """A copy in CPU memory, in `spare` if it fits; pinned, if it comes from a GPU."""
    if spare is None or spare.shape != part.shape or spare.dtype != part.dtype:
        spare = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    return spare.copy_(part)


def state_tensors(parameters: Parameters, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """State of every optimiser as `parameter name::state key` -> tensor (plain numbers as 0-d float64)."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if value is None:
                    continue  # SGD's momentum before its first step with one
                is_tensor = isinstance(value, torch.Tensor)
                tensor = value if is_tensor else torch.tensor(value, dtype=torch.float64)
                tensors[f"{names[id(parameter)]}{SEPARATOR}{key}"] = tensor.detach()
    return tensors


class Reader:
    """The pieces of one kind in a checkpoint.

    Args:
        folder: a committed checkpoint.
        kind: `trainable` or `optimizer`.
        files: the names of its files.
    """

    def __init__(self, folder: Path, kind: str, files: Sequence[str]) -> None:
        self._folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[Path, str, tuple[int, ...]]]] = {}
        for name in files:
            if name.startswith(f"{kind}-"):
                with safe_open(folder / name, "pt") as opened:
                    index = json.loads((opened.metadata() or {})[_INDEX])
                for key, where in index.items():
                    tensor = where.get("of", key)  # a file may have several pieces of one
                    self.shapes[tensor] = tuple(where["shape"])
                    piece = (folder / name, key, tuple(where["offset"]))
                    self._pieces.setdefault(tensor, []).append(piece)

    def read(self, name: str, part: Region | None = None) -> torch.Tensor:
        """The part of a tensor at an offset and of a shape, put together from all pieces that overlap it.

        Raises:
            CheckpointError: if a piece is missing.
        """
        offset, shape = part or ((0,) * len(self.shapes[name]), self.shapes[name])
        found: torch.Tensor | None = None
        covered = 0
        for file, key, begin in self._pieces[name]:
            # Closed after each piece, so that its pages can go.
            with safe_open(file, "pt") as opened:
                piece = opened.get_slice(key)
                size = piece.get_shape()
                low = [max(o, b) for o, b in zip(offset, begin, strict=True)]
                ends = zip(offset, shape, begin, size, strict=True)
                high = [min(o + s, b + n) for o, s, b, n in ends]
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                there = tuple(slice(a - b, c - b) for a, b, c in zip(low, begin, high, strict=True))
                data = piece[there] if there else opened.get_tensor(key)
            here = tuple(slice(a - o, c - o) for a, o, c in zip(low, offset, high, strict=True))
            if found is None:
                found = torch.empty(shape, dtype=data.dtype)
            found[here] = data
            covered += data.numel()
        if found is None:
            found = torch.empty(shape)
        if covered != found.numel():
            raise CheckpointError(f"{self._folder}: pieces of `{name}` are missing; use another checkpoint")
        return found


def open_trainable(
    folder: Path, manifest: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Reader:
    """The saved parameters, which must be those that train now.

    Raises:
        CheckpointError: if it has another layout, or other tensors.
    """
    if manifest["layout"] != LAYOUT:
        raise CheckpointError(
            f"{folder}: was saved by another kind of strategy (layout {manifest['layout']!r}); "
            "go on with that strategy, or convert it"
        )
    reader = Reader(folder, "trainable", manifest["files"])
    if reader.shapes.keys() != shapes.keys():
        odd = sorted(reader.shapes.keys() ^ shapes.keys())[0]
        raise CheckpointError(f"{folder}: `{odd}` is trained on one side only; the recipe is another one")
    for name, shape in shapes.items():
        if reader.shapes[name] != shape:
            had = f"had shape {reader.shapes[name]}, now it has {shape}"
            raise CheckpointError(f"{folder}: `{name}` {had}; the recipe is another one")
    return reader


def restore(
    folder: Path, manifest: Mapping[str, Any], parameters: Parameters, optimizers: Optimizers
) -> None:
    """Load this rank's parts of parameters and optimiser state from a checkpoint of any number of writers.

    Raises:
        CheckpointError: if it has another layout, or other tensors than train now.
    """
    trainable = open_trainable(folder, manifest, {n: tuple(p.shape) for n, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            if local(parameter).numel():
                local(parameter).copy_(trainable.read(name, region(parameter)))
    _restore_state(Reader(folder, "optimizer", manifest["files"]), parameters, optimizers)


def _restore_state(reader: Reader, parameters: Parameters, optimizers: Optimizers) -> None:
    put_state(
        parameters, optimizers, ((name, _read_state(reader, name, parameters)) for name in reader.shapes)
    )


def _read_state(reader: Reader, name: str, parameters: Parameters) -> torch.Tensor:
    parameter = parameters[name.rpartition(SEPARATOR)[0]]
    device = local(parameter).device
    if reader.shapes[name] != tuple(parameter.shape):
        return reader.read(name).to(device)
    part = region(parameter)  # spread as the parameter is
    value = reader.read(name, part) if 0 not in part[1] else torch.empty(part[1])
    return with_local(parameter.detach(), value.to(device))


def put_state(
    parameters: Parameters, optimizers: Optimizers, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Set optimiser state, named as by `state_tensors`, to these tensors themselves."""
    owners: dict[int, list[torch.optim.Optimizer]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owners.setdefault(id(parameter), []).append(optimizer)
    for name, tensor in tensors:
        parameter_name, _, key = name.rpartition(SEPARATOR)
        parameter = parameters[parameter_name]
        # An optimiser that shares its parameters with another names the state that is its own.
        owner = min(owners[id(parameter)], key=lambda found: key not in getattr(found, "own_keys", ()))
        owner.state[parameter][key] = tensor
