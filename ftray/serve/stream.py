"""Server-sent events, and the end of a request whose client has gone."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ftray.core.errors import RequestError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
"""End of a stream that is complete; a failed one ends without it."""


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(data: dict[str, Any]) -> bytes:
    """The event that ends a stream which failed after it began."""
    return b"event: error\n" + event(data)


class ClientGone(Exception):
    """The client closed the connection before the answer began; nobody reads a response."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for `work`, but cancel it when the client disconnects. Raises `ClientGone`."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancelled(task, watcher)


class EventStream(StreamingResponse):
    """A response of server-sent events that closes its source as soon as the client is gone.

    The source's `aclose` runs whatever happens, so that the engine frees what the request holds, and then `on_end`.

    Args:
        events: what is sent.
        headers: sent before it.
        on_end: called once nothing more is sent.
        within: the time all of it has (`RequestError` after that): a client that stays and reads nothing would
            hold its request for ever.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: dict[str, str],
        on_end: Callable[[], None],
        within: AbstractAsyncContextManager[None],
    ) -> None:
        # A proxy in between must pass events on as they come.
        headers = headers | {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._on_end = on_end
        self._within = within

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until they end, the client leaves or the time is over."""
        try:
            with contextlib.suppress(ClientGone, OSError, RequestError):
                async with self._within:
                    await unless_gone(receive, self._send(send))
        finally:
            try:
                await self._events.aclose()
            finally:
                self._on_end()

    def _send(self, send: Send) -> Coroutine[Any, Any, None]:
        return self.stream_response(send)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
