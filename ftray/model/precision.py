"""Which type to compute in: float32 masters always, bfloat16 arithmetic where it is faster."""

import contextlib
import os
from typing import Any

import torch

KERNELS_KEPT = 64
"""Shapes of matrix products in bfloat16 that a CPU process keeps kernels for: those of a micro batch, about."""
# oneDNN's primitive cache, and the one that PyTorch has before it: each keeps about 270 KiB a shape.
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KERNEL_BYTES = len(_CAPACITIES) * KERNELS_KEPT * (270 << 10)
"""What these kernels take at most."""


def bound_kernels(kept: int = KERNELS_KEPT) -> None:
    """Let a process keep few kernels; it must not have had a product yet. What a user says of them stays.

    Rows and documents of many lengths bring ever new shapes: by default 1024 kernels are kept, twice: half a GiB.
    """
    for name in _CAPACITIES:
        os.environ.setdefault(name, str(kept))


def autocast(bf16: bool, device_type: str = "cpu") -> Any:
    """Context of the forward pass: bfloat16 autocast, or nothing."""
    if bf16 and device_type == "cpu":
        bound_kernels()
    return torch.autocast(device_type, torch.bfloat16) if bf16 else contextlib.nullcontext()
