"""Outermost of every application here: asks for a key, and turns our own mistakes into a plain 500."""

import logging
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from ftray.config.tenant import Scope as KeyScope
from ftray.core.errors import RequestError
from ftray.serve import errors
from ftray.serve.front import Front

logger = logging.getLogger(__name__)

METRICS_PATH = "/metrics"
_OPEN_PATHS = frozenset({"/healthz"})
_SCOPES: dict[str, KeyScope] = {
    METRICS_PATH: "metrics",
    "/v1/models": "models",
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
}


class Shell:
    """Authenticates every path but the open ones, by the path the application routes on and by nothing else.

    Args:
        app: the application inside.
        front: knows who may ask.
    """

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self._app = app
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; anything but HTTP is closed unanswered."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        await guarded(self._authenticated, scope, receive, send)

    async def _authenticated(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in _OPEN_PATHS:
            key = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            wanted = _SCOPES.get("/v1/models" if path.startswith("/v1/models/") else path)
            scope.setdefault("state", {})["caller"] = self._front.access.authenticate(key, wanted)
        await self._app(scope, receive, send)


async def guarded(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Call an application; what it raises becomes an error in OpenAI's shape, without its words if it is ours."""
    started = False

    async def watched(message: Any) -> None:
        nonlocal started
        started = True
        await send(message)

    try:
        await app(scope, receive, watched)
    except RequestError as error:
        if not started:
            await errors.response(error)(scope, receive, send)
    except Exception as error:
        # Neither client nor log gets the message: it may quote a prompt.
        logger.error("internal error on %s: %s", scope["path"][:200], errors.described(error))
        if not started:
            await errors.response(errors.internal())(scope, receive, send)
