"""Publishing a delta once it was measured: the way into a registry for whatever made the delta."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from ftray.core.errors import DeltaError, FtrayError
from ftray.delta import files as delta_files
from ftray.delta import manifest
from ftray.delta.manifest import Delta
from ftray.delta.parity import Parity, check_parity
from ftray.delta.publishable import check_safe
from ftray.engine.api import EngineConfig
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.eval.parity import certify
from ftray.model.folder import resolve_folder, weight_map
from ftray.model.identity import base_identity
from ftray.registry.entry import Entry
from ftray.registry.ref import check_alias, check_name
from ftray.registry.registry import Registry
from ftray.registry.stage import BESIDE


def publish(
    registry: Registry,
    folder: Path,
    name: str,
    *,
    base: str = "",
    engine: EngineConfig | None = None,
    parity: bool = True,
    aliases: Iterable[str] = (),
    metrics: Mapping[str, float] | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Entry:
    """Measure a delta's parity certificate and publish the delta with it; `entry.delta.parity` is None without one.

    It costs loading the base twice, one after the other, and three passes over four prompts of 96 tokens at most;
    at its peak the base in float32, and once more for a delta that is no plain LoRA.

    Args:
        registry: where to.
        folder: the delta.
        name: name to publish it under.
        base: folder or Hub id of its base; empty: the folder its recipe was trained on, if that still holds the
            base, else there is no certificate.
        engine: what will serve it; None: the `torch` engine.
        parity: False: do not measure.
        aliases: aliases to point at the new version.
        metrics: as for `Registry.publish`.
        lineage: as for `Registry.publish`.

    Raises:
        DeltaError: if it is unsafe, of another base, does not answer alike, or there is no memory to find out.
        RegistryError: if the name or an alias is refused.
    """
    check_name(name)
    wanted = [check_alias(alias) for alias in aliases]
    if base:
        manifest.check_base(manifest.read(folder, verify=False), base_identity(base))
    found = _measured(folder, base, engine or TorchEngineConfig()) if parity else None
    return registry.publish(folder, name, metrics=metrics, lineage=lineage, aliases=wanted, parity=found)


def _measured(folder: Path, base: str, engine: EngineConfig) -> Parity | None:
    delta = manifest.read(folder, beside=BESIDE)
    check_safe(folder, delta)  # before anything of it is loaded
    base = base or _own_base(folder, delta)
    if not base:
        return None
    _check_memory(resolve_folder(base), delta)
    found = certify(folder, base, engine)
    check_parity(found, delta.digest)
    return found


def _own_base(folder: Path, delta: Delta) -> str:
    """Where its recipe says that its base is; empty if that is not here, or holds something else by now."""
    model = delta.recipe.get("model")
    if not isinstance(model, dict):
        return ""
    # Trained from random weights, it is its own base.
    path = str(folder) if model.get("init") == "config" else str(model.get("model_name_or_path") or "")
    if not Path(path).is_absolute():  # nothing is fetched from the Hub on the word of a manifest
        path = f"./{path}"
    try:
        return path if base_identity(path)["digest"] == delta.base.digest else ""
    except (FtrayError, OSError):
        return ""


def _check_memory(base: Path, delta: Delta) -> None:
    headers = [delta_files.safetensors_header(file) for file in set(weight_map(base).values())]
    numel = sum(
        math.prod(info["shape"])
        for header in headers
        for key, info in header.items()
        if key != "__metadata__"
    )
    needed = 4 * numel * (1 if delta.kind == "low_rank" else 2)
    free = psutil.virtual_memory().available
    if needed > free:
        raise DeltaError(
            f"parity: comparing takes {needed / 2**30:.1f} GiB of memory ({base} in float32), {free / 2**30:.1f}"
            " are free; publish where there is more, or unmeasured with --no-parity"
        )
