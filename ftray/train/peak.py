"""The fastest matrix product of this machine, measured once and remembered."""

import contextlib
import hashlib
import os
import platform
import time
from pathlib import Path

import torch

from ftray.core.errors import FtrayError
from ftray.core.fs import read_json, write_json
from ftray.model.precision import bound_kernels

CACHE = "~/.cache/ftray/peak"
_SECONDS = 0.15


def matmul_peak(bf16: bool, device: torch.device) -> float:
    """Floating-point operations a second of this process's share of the machine, by a short matrix product.

    Kept in a file for each processor, thread count, precision and PyTorch version; `FTRAY_CACHE` moves it.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    key = f"{name}|{torch.get_num_threads()}|{bf16}|{torch.__version__}"
    folder = Path(os.environ.get("FTRAY_CACHE", CACHE)).expanduser()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        return float(read_json(path)["flops_per_s"])
    except (FtrayError, KeyError, TypeError, ValueError):
        found = measure(bf16, device)
    with contextlib.suppress(OSError):  # a home that cannot be written: measured again next time
        write_json(path, {"key": key, "flops_per_s": found})
    return found


def measure(bf16: bool, device: torch.device) -> float:
    """The best rate seen in a short while."""
    bound_kernels()
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if bf16 else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    out, best, end = torch.empty_like(a), 0.0, time.perf_counter() + _SECONDS
    with torch.no_grad():
        while time.perf_counter() < end:
            _wait(device)
            start = time.perf_counter()
            torch.mm(a, a, out=out)
            _wait(device)
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
