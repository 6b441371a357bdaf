"""The admin API: what is served and to whom, changed while the endpoint runs. Its own listener, loopback only."""

import asyncio
import contextlib
import datetime
import hashlib
import hmac
import socket
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ftray.config.tenant import Scope as KeyScope
from ftray.core.errors import RequestError
from ftray.serve import errors
from ftray.serve.control import Control
from ftray.serve.messages import STRICT
from ftray.serve.schema import parse
from ftray.serve.shell import guarded
from ftray.serve.tenant_store import TenantStore, shown

_MAX_BODY_BYTES = 64 * 2**10
LOOPBACK = "127.0.0.1"


class RefBody(BaseModel):
    """A reference to a delta."""

    model_config = STRICT
    model: str


class KeyBody(BaseModel):
    """A key to be made."""

    model_config = STRICT
    scopes: list[KeyScope] | None = None
    grace_s: Annotated[float, Field(ge=0, le=30 * 86400)] | None = None


class TenantBody(BaseModel):
    """A tenant to be added."""

    model_config = STRICT
    name: str
    deltas: list[str] = Field(default_factory=list)
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None


def create_admin_app(control: Control, token_sha256: str) -> ASGIApp:
    """Build the application.

    Args:
        control: what it changes.
        token_sha256: of the token that every request needs.
    """
    admin = _Admin(control)
    app = FastAPI(
        title="ftray admin", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    errors.install(app, spelled=True)
    for method, path, handler in (
        ("GET", "/admin/status", admin.status),
        ("POST", "/admin/load", admin.load),
        ("POST", "/admin/unload", admin.unload),
        ("POST", "/admin/retry", admin.retry),
        ("POST", "/admin/drain", admin.drain),
        ("GET", "/admin/tenants", admin.tenants),
        ("POST", "/admin/tenants", admin.add_tenant),
        ("DELETE", "/admin/tenants/{name}", admin.remove_tenant),
        ("POST", "/admin/tenants/{name}/rotate", admin.rotate),
        ("DELETE", "/admin/tenants/{name}/keys/{key_id}", admin.revoke),
    ):
        app.add_api_route(path, handler, methods=[method])
    return _Shell(app, bytes.fromhex(token_sha256))


class _Shell:
    """Asks every path for the token."""

    def __init__(self, app: ASGIApp, digest: bytes) -> None:
        self._app = app
        self._digest = digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await guarded(self._authenticated, scope, receive, send)

    async def _authenticated(self, scope: Scope, receive: Receive, send: Send) -> None:
        header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        scheme, _, token = header.partition(" ")
        found = hashlib.sha256(token.strip().encode()).digest()
        if not hmac.compare_digest(found, self._digest) or scheme.lower() != "bearer":
            message = "the admin token is missing or not valid; send it as `Authorization: Bearer`"
            raise RequestError(message, status=401, code="invalid_token")
        await self._app(scope, receive, send)


class _Admin:
    """The handlers. What changes files runs off the event loop."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def status(self) -> Response:
        return JSONResponse(self._control.status())

    async def load(self, request: Request) -> Response:
        body = await _body(request, RefBody)
        await self._control.load(body.model)
        return JSONResponse({"loading": body.model}, status_code=202)

    async def unload(self, request: Request) -> Response:
        body = await _body(request, RefBody)
        await self._control.unload(body.model)
        return JSONResponse({"unloading": body.model}, status_code=202)

    async def retry(self) -> Response:
        self._control.retry()
        return JSONResponse({}, status_code=202)

    async def drain(self) -> Response:
        return JSONResponse({"in_flight": self._control.drain()}, status_code=202)

    async def tenants(self) -> Response:
        return JSONResponse({"tenants": [shown(tenant) for tenant in self._control.tenants]})

    async def add_tenant(self, request: Request) -> Response:
        body = await _body(request, TenantBody)
        key = await self._changed("add", body.name, **body.model_dump(exclude={"name"}))
        return JSONResponse({"name": body.name, "key": key}, status_code=201)

    async def remove_tenant(self, name: str) -> Response:
        await self._changed("revoke", name)
        return JSONResponse({"removed": name})

    async def rotate(self, request: Request, name: str) -> Response:
        body = await _body(request, KeyBody)
        grace = datetime.timedelta(seconds=body.grace_s or 0)
        return JSONResponse({"name": name, "key": await self._changed("rotate", name, grace=grace)})

    async def revoke(self, name: str, key_id: str) -> Response:
        await self._changed("revoke", name, key_id)
        return JSONResponse({"revoked": key_id})

    async def _changed(self, change: str, *arguments: Any, **fields: Any) -> Any:
        """Change the tenants' file and follow it at once."""
        store: TenantStore | None = self._control.store
        if store is None:
            raise RequestError("there is no `tenants_file`; name one in the serve file", status=409)
        result = await asyncio.to_thread(getattr(store, change), *arguments, **fields)
        await self._control.look()
        return result


async def _body(request: Request, cls: Any) -> Any:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > _MAX_BODY_BYTES:
            raise RequestError(
                f"the body has more than {_MAX_BODY_BYTES} bytes; shorten it", status=413, code="too_large"
            )
    return parse(bytes(data) or b"{}", cls)


class _Server(uvicorn.Server):
    """Leaves the process's signals to whoever owns the process."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """See `uvicorn.Server`."""
        return contextlib.nullcontext()


class AdminServer:
    """Serves the application on loopback, in the event loop it is started in.

    Args:
        app: the application.
        port: 0: a free one, which `port` then names.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((LOOPBACK, port))
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False)
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Stop listening."""
        self._server.should_exit = True
        if self._task:
            await self._task
        self._socket.close()
