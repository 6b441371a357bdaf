"""The seam between HTTP and what generates: a test puts an engine in this process here, Ray Serve a handle."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from ftray.engine.api import EngineInfo, EngineStats, Output, Request


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a `model` field can name."""

    id: str
    """Name in `/v1/models`."""
    ref: str
    """What it is exactly: `name@version`, or the base's name."""
    digest: str
    """Digest of what answers; also the delta's name inside the engine."""
    is_base: bool = False
    """Whether it is the base itself."""

    @property
    def delta(self) -> str | None:
        """The delta's name inside the engine; None: the base."""
        return None if self.is_base else self.digest

    @property
    def name(self) -> str:
        """The delta's name alone, whichever version."""
        return self.ref.partition("@")[0]


class Unavailable(Exception):
    """The engine went away before the request ended."""


class Backend(Protocol):
    """Generates for the HTTP layer."""

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Outputs until one has a `finish_reason`; closing the generator cancels the request.

        Raises:
            RequestError: if the request is refused, before the first output.
            Unavailable: if the engine is gone.
        """
        ...

    async def info(self) -> EngineInfo:
        """Facts about the engine. Raises `Unavailable`."""
        ...

    async def stats(self) -> EngineStats:
        """Load of the engine. Raises `Unavailable`."""
        ...
