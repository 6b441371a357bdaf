"""What one request, and all requests of one tenant, may take of the endpoint: time and memory."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from ftray.core.errors import RequestError
from ftray.serve.stream import ClientGone

MAX_BODY_BYTES = 8 * 2**20
MAX_TENANT_BODY_BYTES = 8 * MAX_BODY_BYTES
"""Bytes of all bodies a tenant has here at once, from their arrival until they are tokens."""


class Deadline:
    """The time of one request, running from now."""

    def __init__(self, limit_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._started_s = self._loop.time()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request arrived."""
        return self._loop.time() - self._started_s

    @contextlib.asynccontextmanager
    async def kept(self, grace_s: float = 0.0) -> AsyncIterator[None]:
        """Cancel what runs inside once the time and a grace are over. Raises `RequestError` (504)."""
        try:
            async with asyncio.timeout_at(self._started_s + self._limit_s + grace_s):
                yield
        except TimeoutError:
            message = f"the request took more than {self._limit_s:g} s; ask for fewer tokens or answers"
            raise RequestError(message, status=504, code="timeout") from None


class Bodies:
    """Reads request bodies, up to limits that hold whatever the headers say."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A body; it counts against its tenant until the block ends.

        Raises:
            RequestError: 413 for one that is too large, 429 while the tenant has too many here.
            ClientGone: if the client leaves before it has sent all.
        """
        tenant, parts, size = request.state.caller.name, [], 0
        try:
            async for part in request.stream():
                size += len(part)
                self._held[tenant] += len(part)
                if size > MAX_BODY_BYTES:
                    message = f"the body has more than {MAX_BODY_BYTES} bytes; shorten it"
                    raise RequestError(message, status=413, code="too_large")
                if self._held[tenant] > MAX_TENANT_BODY_BYTES:
                    message = "too many large requests at once; try again shortly"
                    raise RequestError(message, status=429, code="overloaded")
                parts.append(part)
            yield b"".join(parts)
        except ClientDisconnect:
            raise ClientGone from None
        finally:
            self._held[tenant] -= size
            if not self._held[tenant]:
                del self._held[tenant]
