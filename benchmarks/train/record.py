"""One file of results from several runs of the benchmark, each of other sections."""

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
_LIBRARIES = ("torch", "transformers", "trl", "peft", "ray")


def machine() -> Figures:
    """What the figures were measured on."""
    found: Figures = {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{library: version(library) for library in _LIBRARIES},
    }
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["cpu"] = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        found["avx512_bf16"] = any("avx512_bf16" in line for line in lines)
    return found


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> Figures:
    """`old` with everything that `new` says, group by group: what is measured again takes the old one's place."""
    merged = dict(old)
    for key, value in new.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def commands(section: str, found: Figures, words: Sequence[str]) -> dict[str, str]:
    """The command that measured a section, or each set-up of a section that has several.

    Where files lie is left out: it changes no figure.
    """
    places = {n + k for n, word in enumerate(words) if word in ("--folder", "--record") for k in (0, 1)}
    command = " ".join(["python -m benchmarks.train", *(w for n, w in enumerate(words) if n not in places)])
    set_ups = [name for key, group in found.items() if key.startswith("versus") for name in group]
    return {f"{section} {name}".strip(): command for name in set_ups or [""]}
