"""What a machine has, and what a run on it would stumble over. Nothing is contacted and nothing is changed."""

import dataclasses
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from ftray.cluster import native

_GIB = 2**30
_PACKAGES = ("ftray", "torch", "ray", "transformers", "peft", "trl", "deepspeed", "datasets", "wandb")
_NEEDED = ("torch", "ray", "transformers")
_OPEN_FILES = 8192
_FREE_BYTES = 10 * _GIB


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing about a machine."""

    name: str
    """What was looked at."""
    level: Literal["ok", "note", "warning", "error"]
    """`note`: something is absent that only some runs want."""
    value: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty if nothing."""


def inspect() -> list[Finding]:
    """Everything about the machine this process runs on, in about two seconds."""
    parts: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _memory,
        _devices,
        _bf16,
        _compilers,
        _native_ops,
        _disks,
        _limits,
        _services,
        _token,
    ]
    return [finding for part in parts for finding in part()]


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")
    for package in _PACKAGES:
        try:
            yield Finding(package, "ok", version(package))
        except PackageNotFoundError:
            is_needed = package in _NEEDED
            yield Finding(
                package,
                "error" if is_needed else "note",
                "not installed",
                f"install it as `make venv` does ({package} is needed)" if is_needed else "",
            )


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB of it free"
    yield Finding("memory", "ok", text)
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding("shared memory", "warning", "no /dev/shm", "Ray's object store goes to disk; mount one")
        return
    total = shutil.disk_usage(shared).total
    # Ray asks for 30 % of memory and falls back to a folder on disk below that.
    enough = total >= 0.3 * memory.total
    remedy = "" if enough else "give the container more, as `--shm-size`: Ray's object store would go to disk"
    yield Finding("shared memory", "ok" if enough else "warning", f"{total / _GIB:.1f} GiB", remedy)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("cpus", "ok", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")
    cuda = torch.version.cuda
    if not torch.cuda.is_available():
        found = "none" if cuda is None else f"none that torch (built for CUDA {cuda}) can use"
        has_card = Path("/dev/nvidia0").exists()
        remedy = "install a torch built for CUDA, and check `nvidia-smi`" if has_card else ""
        yield Finding("gpus", "warning" if has_card else "note", found, remedy)
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield Finding(f"gpu {index}", "ok", f"{card.name}, {card.total_memory / _GIB:.0f} GiB, {bf16}")


def _bf16() -> Iterator[Finding]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    factor = _matmul_s(torch.float32, device) / _matmul_s(torch.bfloat16, device)
    text = f"products {factor:.1f} times as fast as in float32 on {device}"
    yield Finding("bfloat16", "ok" if factor > 1.1 else "note", text)


def _matmul_s(dtype: object, device: str, size: int = 1024, repeats: int = 5) -> float:
    import torch

    left = torch.randn(size, size, device=device).to(dtype)  # type: ignore[call-overload]
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product = left @ left
        float(product[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return best


def _compilers() -> Iterator[Finding]:
    for tool in ("c++", "ninja"):
        beside = Path(sys.executable).parent / tool
        found = shutil.which(tool) or (str(beside) if beside.exists() else None)
        yield Finding(tool, "ok" if found else "note", found or "not found")


def _native_ops() -> Iterator[Finding]:
    folder = native.extensions_dir()
    named = "TORCH_EXTENSIONS_DIR" if os.environ.get("TORCH_EXTENSIONS_DIR") else "torch's default"
    writable = os.access(_nearest(folder), os.W_OK)
    remedy = "" if writable else "set TORCH_EXTENSIONS_DIR to a folder that can be written to"
    yield Finding("extensions", "ok" if writable else "warning", f"{folder} ({named})", remedy)
    for op in native.OPS:
        text = "built" if native.is_built(op) else "not built; only a trainer of your own may want it"
        yield Finding(f"deepspeed {op}", "ok" if native.is_built(op) else "note", text)
    for lock in native.locks():
        if native.is_stale(lock):
            yield Finding(
                "build lock", "warning", f"{lock} is left of a dead build", "`ftray doctor --build` clears it"
            )
        else:
            yield Finding("build lock", "note", f"{lock}: a build is under way")


def _disks() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HOME

    ray = os.environ.get("RAY_TMPDIR") or "/tmp"
    for name, folder in (
        ("this folder", Path.cwd()),
        ("Ray's folder", Path(ray)),
        ("HF cache", Path(HF_HOME)),
    ):
        free = shutil.disk_usage(_nearest(folder)).free
        enough = free >= _FREE_BYTES
        remedy = "" if enough else "checkpoints, shards or weights may fill it; make room"
        text = f"{folder}: {free / _GIB:.0f} GiB free"
        yield Finding(f"disk: {name}", "ok" if enough else "warning", text, remedy)


def _limits() -> Iterator[Finding]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES
    remedy = "" if enough else f"`ulimit -n {_OPEN_FILES}` (the hard limit is {hard}): Ray opens many"
    yield Finding("open files", "ok" if enough else "warning", str(soft), remedy)


def _services() -> Iterator[Finding]:
    """By configuration only: nobody is asked."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "ON", "YES")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    key = "a token" if _has_token() else "no token"
    hub = "offline: only what is cached or a folder" if offline else f"{endpoint}, {key}"
    yield Finding("Hugging Face", "ok", hub)
    mode = os.environ.get("WANDB_MODE", "online")
    key = "an API key" if os.environ.get("WANDB_API_KEY") or _in_netrc("wandb") else "no API key"
    yield Finding("Weights & Biases", "ok", f"WANDB_MODE {mode}, {key}; only if `tracking` names it")


def _has_token() -> bool:
    from huggingface_hub.constants import HF_TOKEN_PATH

    return bool(os.environ.get("HF_TOKEN")) or Path(HF_TOKEN_PATH).exists()


def _in_netrc(host: str) -> bool:
    try:
        return host in (Path.home() / ".netrc").read_text("utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError):
        return False


def _token() -> Iterator[Finding]:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding("Ray token", "ok", "in RAY_AUTH_TOKEN")
    elif not path.exists():
        yield Finding("Ray token", "ok", f"none yet; {path} is made with the first cluster")
    else:
        mode = stat.S_IMODE(path.stat().st_mode)
        is_closed = not mode & 0o077
        remedy = "" if is_closed else f"others on this machine can use your clusters: `chmod 600 {path}`"
        yield Finding("Ray token", "ok" if is_closed else "warning", f"{path}, mode {mode:04o}", remedy)


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
