"""Where a registry keeps its versions and records: what the kinds of storage have to offer.

A shelf knows nothing of deltas or aliases. It keeps immutable, numbered things below names; of two writers that
want the same number one is told that it is taken.
"""

import contextlib
from pathlib import Path
from typing import Any, Protocol

VERSION_FILE = "ftray_version.json"
"""Name of the record that the registry adds to a delta's files."""


class Shelf(Protocol):
    """Versions (folders) and states (JSON) below names that are checked already."""

    def names(self) -> list[str]:
        """Names below which there may be something."""
        ...

    def versions(self, name: str) -> list[int]:
        """Committed versions of a name, ascending."""
        ...

    def hidden(self, name: str) -> list[int]:
        """Versions that are being removed."""
        ...

    def staging(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """An empty local folder in which a version is made; it is gone after the block."""
        ...

    def commit(self, staged: Path, name: str, version: int) -> None:
        """Make a staged folder a version. Raises `FileExistsError`, leaving the folder, if the number is taken."""
        ...

    def open(self, name: str, version: int, *, whole: bool) -> Path:
        """A local folder with a version's files; if not `whole`, at least its manifest and record.

        Raises:
            FileNotFoundError: if there is no such version any more.
        """
        ...

    def hide(self, name: str, version: int) -> None:
        """Take a version out of sight, so that it can come back."""
        ...

    def unhide(self, name: str, version: int) -> None:
        """Bring a hidden version back."""
        ...

    def remove_hidden(self, name: str, version: int) -> None:
        """Remove a hidden version for good."""
        ...

    def collecting(self) -> contextlib.AbstractContextManager[None]:
        """Held while versions are collected. Raises `RegistryError` if another process does so."""
        ...

    def sweep(self, name: str) -> None:
        """Remove what publishers of a name that were killed left behind, once it is too old to be at work."""
        ...

    def states(self, name: str) -> list[int]:
        """Numbers of the states of a name, ascending."""
        ...

    def read_state(self, name: str, number: int) -> Any:
        """One state. Raises `FtrayError` (one line) if it cannot be read."""
        ...

    def add_state(self, name: str, number: int, value: Any) -> None:
        """Add a state. Raises `FileExistsError` if the number is taken."""
        ...
