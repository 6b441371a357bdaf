"""Which type to compute in: float32 masters always, bfloat16 arithmetic where it is faster."""

import contextlib
from typing import Any

import torch


def autocast(bf16: bool, device_type: str = "cpu") -> Any:
    """Context of the forward pass: bfloat16 autocast, or nothing."""
    return torch.autocast(device_type, torch.bfloat16) if bf16 else contextlib.nullcontext()
