"""Parameters whose checkpoint holds them under other names or in other pieces, as experts are.

transformers keeps the rules (`get_model_conversion_mapping`): renamings, and converters that merge checkpoint
tensors into a parameter or split one into several. Here they are applied to one parameter at a time, so that a
model can be streamed into place, and reverted the same way when it is saved.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from ftray.core.errors import ModelError


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint."""

    file: Path
    key: str
    pattern: str
    """Which of the converter's sources it is; empty without a converter."""


@dataclass(frozen=True)
class Origin:
    """Where the value of one parameter comes from."""

    name: str
    """The parameter."""
    pieces: tuple[Piece, ...]
    converter: WeightConverter | None = None
    """How the pieces become the parameter; None: the one piece is the parameter."""

    @property
    def is_stack(self) -> bool:
        """True if each piece is one index of the parameter's first axis (one expert): a part can be read."""
        return self.converter is not None and (
            type(self.converter.operations[0]) is MergeModulelist
            and self.converter.operations[0].dim == 0
            and all(getattr(op, "dim", 0) != 0 for op in self.converter.operations[1:])
        )


def find_origins(model: Any, files: dict[str, Path]) -> dict[str, Origin]:
    """Where each of a model's tensors comes from.

    Args:
        model: the structure; its parameters may be on meta.
        files: checkpoint key -> safetensors file.
    """
    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state, prefix = dict(model.state_dict()), model.base_model_prefix
    pieces: dict[str, list[Piece]] = {}
    used: dict[str, WeightConverter] = {}
    for key in sorted(files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        targets = [name]
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            targets += [name.replace(first, other) for other in others]
        for target in targets:
            if target in state:
                pieces.setdefault(target, []).append(Piece(files[key], key, pattern or ""))
                if pattern is not None:
                    used[target] = by_pattern[pattern]
    return {name: Origin(name, tuple(found), used.get(name)) for name, found in pieces.items()}


def read(origin: Origin, model: Any, dtype: torch.dtype) -> torch.Tensor:
    """A parameter's whole value, in the given type.

    Raises:
        ModelError: if the pieces cannot be put together.
    """
    if origin.converter is None:
        ((_, tensor),) = _tensors(origin.pieces[-1:], dtype)
        return tensor
    return _convert(origin, origin.pieces, model, dtype)


def read_rows(origin: Origin, model: Any, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
    """Indices `[start, stop)` of a parameter's first axis, `stop > start`; no more is read where that can be.

    Raises:
        ModelError: as `read`.
    """
    if origin.converter is None:
        piece = origin.pieces[-1]
        with safe_open(piece.file, "pt") as opened:
            # A copy: a view would keep the whole file mapped, with the rows of other ranks beside its own.
            return opened.get_slice(piece.key)[start:stop].to(dtype, copy=True)
    if not origin.is_stack:
        return read(origin, model, dtype)[start:stop].clone()
    wanted: list[Piece] = []
    for pattern in dict.fromkeys(piece.pattern for piece in origin.pieces):
        wanted += [piece for piece in origin.pieces if piece.pattern == pattern][start:stop]
    return _convert(origin, wanted, model, dtype)


def _tensors(pieces: Sequence[Piece], dtype: torch.dtype) -> Iterator[tuple[Piece, torch.Tensor]]:
    # A file is opened once a parameter (its header may name thousands of experts) and closed after it, which lets
    # its pages go: the peak is the model plus one parameter.
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in {p.file for p in pieces}}
        for piece in pieces:
            yield piece, opened[piece.file].get_tensor(piece.key).to(dtype)


def _convert(origin: Origin, pieces: Sequence[Piece], model: Any, dtype: torch.dtype) -> torch.Tensor:
    converter = copy.deepcopy(origin.converter)
    assert converter is not None
    for piece, tensor in _tensors(pieces, dtype):
        converter.add_tensor(origin.name, piece.key, piece.pattern, tensor)  # type: ignore[arg-type]
    try:
        found = converter.convert(origin.name, model=model, config=model.config)[origin.name]
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        file = origin.pieces[0].file
        raise ModelError(
            f"{file}: `{origin.name}` cannot be made of {len(origin.pieces)} tensors ({reason}); is it complete?"
        ) from None
    value: torch.Tensor = found[0] if isinstance(found, list) else found
    return value.contiguous()


def revert(model: Any, parameters: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Checkpoint keys and tensors of a model's parameters, as `save_pretrained` would name and shape them.

    Works a parameter at a time (those that are pieces of one tensor wait for each other), on meta tensors too, so
    a file's header can be written before any value is gathered.
    """
    # What was loaded under names of an older release is saved under today's; a prefix is known only to the loader.
    rules = list(get_model_conversion_mapping(model, add_legacy=False) or [])
    backward = [rule.reverse_transform() for rule in rules[::-1] if not isinstance(rule, PrefixChange)]
    renamings = [rule for rule in backward if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in backward if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    waiting: dict[str, WeightConverter] = {}
    for name, tensor in parameters:
        target, pattern = apply_converters(name, converters)
        if pattern is None:
            yield apply_renamings(name, renamings), tensor
            continue
        converter = waiting.setdefault(target, copy.deepcopy(by_pattern[pattern]))
        converter.add_tensor(target, name, pattern, tensor)  # type: ignore[arg-type]
        if len(converter.collected_tensors) < len(converter.source_patterns):
            continue
        made = waiting.pop(target).convert(target, model=model, config=model.config)
        for key, value in made.items():
            yield apply_renamings(key, renamings), value[0] if isinstance(value, list) else value
    assert not waiting, f"parts of {sorted(waiting)} are missing"
