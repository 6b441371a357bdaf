"""Small native kernels of the engine: low-rank updates and decode attention on CPUs.

They are compiled ahead, by `make` or `ftray doctor --build`, for the machine they will run on, and never by a
process that serves: one that does not find them computes the same in plain torch.
"""

import functools
import hashlib
import platform
import shutil
from pathlib import Path

import torch

from ftray.cluster.native import extensions_dir
from ftray.core.errors import ClusterError

NAME = "ftray_engine"
_HERE = Path(__file__).parent
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]


def library() -> Path:
    """Where the compiled kernels are or will be: another place for other sources, another torch or processor."""
    identity = [torch.__version__, platform.machine(), _processor(), *_FLAGS]
    for file in sorted([*_HERE.glob("*.cpp"), *_HERE.glob("*.h")]):
        identity += [file.name, file.read_text()]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    return extensions_dir() / f"{NAME}_{digest}" / f"{NAME}.so"


def build() -> Path:
    """Compile the kernels unless they are; returns the library.

    Raises:
        ClusterError: one line, if there is no compiler or it fails.
    """
    target = library()
    if target.is_file():
        return target
    from torch.utils import cpp_extension

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        cpp_extension.load(
            NAME,
            sources=[str(file) for file in sorted(_HERE.glob("*.cpp"))],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=str(target.parent),
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        shutil.rmtree(target.parent, ignore_errors=True)
        reason = next((line for line in str(error).splitlines() if "error" in line.lower()), str(error))
        raise ClusterError(
            f"{NAME}: the build failed ({reason.strip()[:160]}); the engine runs without"
        ) from None
    return target


@functools.cache
def available() -> bool:
    """True if the kernels are built for this machine; loads them."""
    target = library()
    if not target.is_file():
        return False
    try:
        torch.ops.load_library(str(target))
    except OSError:
        return False
    return True


def _processor() -> str:
    """What tells processors apart that do not run each other's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
