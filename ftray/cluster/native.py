"""Native operations that DeepSpeed compiles when they are first used: what is built, what is stuck, and a build.

ftray itself needs none of them. A trainer of the user's own may, and a compiler that starts inside a worker looks
like a hang; so they are built ahead, in a process of their own.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ftray.core.errors import ClusterError

OPS = {"cpu_adam": "CPUAdamBuilder", "deepspeed_shm_comm": "ShareMemCommBuilder"}
"""Operation -> DeepSpeed's builder of it."""
_BUILD = """
import sys
from deepspeed.accelerator import get_accelerator
builder = get_accelerator().create_op_builder(sys.argv[1])
sys.exit(3) if builder is None else builder.jit_load(verbose=False)
"""
_COMPARE = """
import time, torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

def seconds(make):
    weights = [torch.nn.Parameter(torch.randn(1 << 22)) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer, times = make(weights), []
    for _ in range(8):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return min(times[2:])

pairs = [(seconds(lambda w: torch.optim.AdamW(w, fused=True)), seconds(DeepSpeedCPUAdam)) for _ in range(6)]
ours, theirs = map(min, zip(*pairs))
print(ours / theirs)
"""
_TIMEOUT_S = 1800.0


def extensions_dir() -> Path:
    """Where PyTorch puts what is compiled at run time (`TORCH_EXTENSIONS_DIR`, or its own default)."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    import torch
    from torch._appdirs import user_cache_dir  # not through cpp_extension, which imports setuptools

    version = torch.version.cuda
    build = "cpu" if version is None else f"cu{version.replace('.', '')}"
    return (
        Path(user_cache_dir(appname="torch_extensions")).resolve()
        / f"py{sys.version_info.major}{sys.version_info.minor}_{build}"
    )


def is_built(op: str) -> bool:
    """True if an operation is compiled and nobody is at it."""
    folder = extensions_dir() / op
    return (folder / f"{op}.so").exists() and not (folder / "lock").exists()


def locks() -> list[Path]:
    """Build locks that lie in the folder of extensions, stale or not."""
    return sorted(extensions_dir().glob("*/lock"))


def is_stale(lock: Path) -> bool:
    """True if no process of this machine holds a build lock open: its builder was killed.

    A builder keeps the file open until it removes it (`torch.utils.file_baton`), so whoever finds it closed would
    wait for ever. Processes of other users that cannot be looked into count as holding it.
    """
    target = os.path.realpath(lock)
    return not any(held is None or os.path.realpath(held) == target for held in _open_files())


def compare_adam() -> float:
    """Seconds of a step of torch's fused AdamW over those of DeepSpeed's `cpu_adam`, which must be built.

    The best steps of each over 16.8M elements, taken in turns, since both wait for memory and others use it too.

    Raises:
        ClusterError: if it does not run.
    """
    done = subprocess.run(
        [sys.executable, "-c", _COMPARE], capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ClusterError(f"cpu_adam: it is built and does not run ({reason[0][:160]})")
    return float(done.stdout.split()[-1])


def _open_files() -> Iterator[str | None]:
    """Paths that processes have open; None for another user's process that may not be looked into."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            try:
                descriptors = list((process / "fd").iterdir())
            except PermissionError:
                # Only a process with this user's rights, or root's, could have made the lock.
                if process.stat().st_uid == os.getuid():
                    yield None
                continue
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    yield str(descriptor.readlink())


def clear_stale_locks() -> list[Path]:
    """Remove the locks of builders that are dead; returns them."""
    cleared = []
    for lock in locks():
        if is_stale(lock):
            lock.unlink(missing_ok=True)
            cleared.append(lock)
    return cleared


def build(op: str) -> bool:
    """Compile an operation in a process of its own; returns False if this machine's accelerator has none such.

    Raises:
        ClusterError: one line, if DeepSpeed is missing or the build fails.
    """
    if find_spec("deepspeed") is None:
        raise ClusterError(
            "deepspeed is not installed; install `ftray[deepspeed]` first, or leave out `--build`"
        )
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, OPS[op]], capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    if done.returncode == 3:
        return False
    if done.returncode:
        log = extensions_dir() / f"{op}.log"
        with contextlib.suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(done.stdout + done.stderr)
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ClusterError(f"{op}: the build failed ({reason[0][:160]}); see {log}, and `ftray doctor`")
    return True
