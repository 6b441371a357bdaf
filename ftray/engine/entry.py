"""A delta as the engine knows it."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ftray.core.errors import DeltaError, FtrayError, RegistryError
from ftray.engine.api import Source
from ftray.engine.places import HostDelta

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Entry:
    """A delta that has, or had, a name. Sequences hold on to it, whatever becomes of the name."""

    name: str
    source: Source
    digest: str = ""
    kind: str = ""
    mixed_batch: bool = True
    size_bytes: int = 0
    slot: int = 0
    """Order in place; 0: it is not."""
    host: HostDelta | None = None
    """In memory."""
    reading: "Future[HostDelta] | None" = None
    error: FtrayError | None = None
    """Why it could not be read."""
    refs: int = 0
    """Sequences that run under it."""
    in_flight: int = 0
    """Sequences that wait or run under it."""
    leaving: bool = False
    """Its place was promised to another: nothing more enters until it is there."""

    @property
    def key(self) -> str:
        """What the runner knows it by. Keys are never used twice, so nothing an earlier holder left can answer."""
        return f"slot{self.slot}"


def said(entry: Entry, error: Exception) -> FtrayError:
    """A failure under the delta as an error of ours, in one line."""
    if isinstance(error, FtrayError):
        return error
    reason = " ".join(str(error).split())[:160]
    return FtrayError(f"{entry.name}: not to be had now ({type(error).__name__}: {reason})")


def refusal(entry: Entry) -> tuple[str, int]:
    """What those who ask for a delta that cannot be had are told, and the HTTP status.

    The reason names files and digests, which are for the log alone.
    """
    logger.warning("%s: requests under it end: %s", entry.name, entry.error)
    if isinstance(entry.error, DeltaError | RegistryError):
        return f"{entry.name}: cannot be used; publish it anew", 400
    return f"{entry.name}: not to be had now; try again shortly", 503


def fetch(read: Callable[[str], HostDelta], source: Source) -> HostDelta:
    """Bring a delta's files and read them."""
    return read(source if isinstance(source, str) else source())
