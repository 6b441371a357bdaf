"""One published version of a delta, as the registry hands it out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.core.spec import dump
from ftray.delta.manifest import Delta


@dataclass(frozen=True)
class Entry:
    """One published version of a delta."""

    name: str
    version: int
    path: Path
    """Folder of the version; plain `peft` (or Transformers) loads it. Of a remote registry it is a local
    copy, whole if the entry was resolved."""
    delta: Delta
    digest: str
    """`delta.digest`: the identity of what answers."""
    published_at: str
    """Time of publication, UTC, ISO 8601."""
    size_bytes: int
    """Size of its files."""
    aliases: tuple[str, ...] = ()
    """Aliases that point here now."""

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    def to_json(self) -> dict[str, Any]:
        """Everything known of it as plain data."""
        return {
            "ref": self.ref,
            "digest": self.digest,
            "published_at": self.published_at,
            "size_bytes": self.size_bytes,
            "aliases": list(self.aliases),
            "path": str(self.path),
            **dump(self.delta),
        }
