"""Which memory allocator a training process on CPUs should have.

glibc before 2.38 cannot put an aligned block into a hole of its own size (bug 14581), and PyTorch aligns every
tensor: a step's peak was up to 2.6 times what it holds. Ray's wheel brings jemalloc, which does not have that.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ftray.config.load import apply_override, read_yaml
from ftray.core.errors import FtrayError

SWITCH = "FTRAY_ALLOCATOR"
"""Environment variable: `system` leaves the allocator alone."""
# Freed memory is kept for the next step, which takes the same sizes again; large blocks share the ordinary arenas.
_SETTINGS = "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0"
_DONE = "FTRAY_ALLOCATOR_SET"


def environment() -> dict[str, str]:
    """Variables that give a new process jemalloc; empty where it is not to be had, not wanted or chosen already."""
    if (
        os.environ.get(SWITCH) == "system"
        or os.environ.get("LD_PRELOAD")
        or os.environ.get("MALLOC_CONF")
        or not sys.platform.startswith("linux")
    ):
        return {}
    spec = importlib.util.find_spec("ray")  # finds the folder, imports nothing
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        library = Path(folder) / "core" / "libjemalloc.so"
        if library.is_file():
            return {"LD_PRELOAD": str(library), "MALLOC_CONF": _SETTINGS, _DONE: "1"}
    return {}


def restart_for(words: Sequence[str]) -> None:
    """Begin `ftray run ...` anew under `environment()` if it trains in this process; else return.

    The workers of a group are given the same environment when they start.
    """
    found = environment()
    if found and _DONE not in os.environ and _trains_here(words):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **found})


def _trains_here(words: Sequence[str]) -> bool:
    """True if the recipe among the words says `strategy: single`; what is wrong with it is told later."""
    plain = [word for word in words if not word.startswith("-")]
    try:
        tree = read_yaml(plain[0]) if plain else None
        if not isinstance(tree, dict):
            return False
        for override in plain[1:]:
            apply_override(tree, override)
    except FtrayError:
        return False
    strategy = tree.get("strategy")
    return (strategy.get("type") if isinstance(strategy, dict) else strategy) == "single"
