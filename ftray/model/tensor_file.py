"""Safetensors files written one tensor at a time, so that no second copy of their content is ever in memory.

The format is a length, a JSON header and the tensors' bytes (github.com/huggingface/safetensors). The header needs
names, types and shapes only, so it is written before any tensor is at hand.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Type and shape of each tensor of a file."""


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


class TensorFile:
    """A safetensors file being written.

    Args:
        path: the file; replaced if it is there.
        layout: what will be put in.
        metadata: free text for the header.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._layout, self._places, end = dict(layout), dict[str, int](), 0
        for name, (dtype, shape) in self._layout.items():
            begin, end = end, end + num_bytes(dtype, shape)
            self._places[name] = begin
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._left = set(layout)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._data_start + end)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, in any order; its type and shape must be those announced."""
        dtype, shape = self._layout[name]
        assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), name
        self._file.seek(self._data_start + self._places[name])
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._file.write(flat.view(torch.uint8).numpy().data)
        self._left.discard(name)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert error is not None or not self._left, f"announced and not written: {sorted(self._left)[:3]}"


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a whole mapping at once, without a copy of it."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFile(path, layout, metadata) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)
