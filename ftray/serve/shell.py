"""Outermost of every application here: asks for a key, and turns our own mistakes into a plain 500."""

import logging
from typing import Any

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from ftray.config.tenant import Scope as KeyScope
from ftray.core.errors import RequestError
from ftray.serve import errors
from ftray.serve.front import Front

logger = logging.getLogger(__name__)

METRICS_PATH = "/metrics"
_HEALTH_PATH = "/healthz"
_ONE_MODEL = "/v1/models/"
ROUTES: dict[str, KeyScope | None] = {
    METRICS_PATH: "metrics",
    "/openapi.json": None,
    "/v1/models": "models",
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
}
"""What a key must be good for on each path; None: any key will do. A model's own path is beside them."""


class Shell:
    """Authenticates every path but the open one, and lets no path through that has no place in `ROUTES`.

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
        path = get_route_path(scope)  # what the application routes on
        if path != _HEALTH_PATH:
            # A route's pattern also matches with a newline behind it, so a path is known exactly or not at all.
            one_model = path.startswith(_ONE_MODEL) and "/" not in path[len(_ONE_MODEL) :]
            route = "/v1/models" if one_model else path
            key = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            caller = self._front.access.authenticate(key, ROUTES.get(route))
            if route not in ROUTES:
                raise RequestError(
                    "there is no such path; /openapi.json lists them", status=404, code="not_found"
                )
            scope.setdefault("state", {})["caller"] = caller
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
