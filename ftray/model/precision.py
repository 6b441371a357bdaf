"""Which type to compute in: float32 masters always, bfloat16 arithmetic where it is faster."""

import contextlib
import time
from typing import Any

import torch


def bf16_is_faster(width: int = 512, tokens: int = 512, repeats: int = 4) -> bool:
    """Time a matrix product of a training step's shape in both types on this machine; about 20 ms.

    Args:
        width: the model's hidden size.
        tokens: tokens in a forward pass.
        repeats: products timed; the best of each type counts, so that a busy machine does not decide.
    """

    def best(dtype: torch.dtype) -> float:
        x, w = torch.randn(tokens, width).to(dtype), torch.randn(4 * width, width).to(dtype)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return best(torch.bfloat16) < best(torch.float32)


def autocast(bf16: bool, device_type: str = "cpu") -> Any:
    """Context of the forward pass: bfloat16 autocast, or nothing."""
    return torch.autocast(device_type, torch.bfloat16) if bf16 else contextlib.nullcontext()
