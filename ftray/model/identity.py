"""What makes two bases the same base."""

import functools
from pathlib import Path
from typing import Any

from ftray.core.fs import digest_file, digest_json, read_json
from ftray.model.folder import resolve_folder, weight_map

_NOT_IDENTITY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


@functools.lru_cache(maxsize=8)
def _identity(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> dict[str, Any]:
    config = {k: v for k, v in read_json(folder / "config.json").items() if k not in _NOT_IDENTITY}
    files = {Path(name).name: digest_file(Path(name)) for name, _, _ in stamp}
    digest = digest_json({"config": config, "weights": files})
    return {"digest": digest, "model_type": config["model_type"], "name": folder.name}


def base_identity(folder: str | Path) -> dict[str, Any]:
    """Identity of a base: a digest over its weight files and the part of its configuration that matters.

    Returns:
        `{"digest": "xxh3:...", "model_type": ..., "name": ...}`; the name is for people, the digest decides.
    """
    path = resolve_folder(str(folder))
    files = sorted({str(file) for file in weight_map(path).values()})
    stats = [(name, Path(name).stat()) for name in files]
    return dict(_identity(path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)))
