"""The HTTP API, OpenAI's as far as it is built, over whatever generates."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ftray.core.errors import RequestError
from ftray.engine import api
from ftray.serve import errors, schema, stream
from ftray.serve.backend import Backend, ServedModel, Unavailable
from ftray.serve.limits import Bodies, Deadline
from ftray.serve.metrics import UNKNOWN, Metrics
from ftray.serve.prompts import Prompts
from ftray.serve.replies import Reply, error_body, model_card
from ftray.serve.tenants import Access

logger = logging.getLogger(__name__)

_INLINE_BODY_BYTES = 32 * 2**10
_OPEN_PATHS = frozenset({"/healthz"})
_METRICS_PATH = "/metrics"
_CHAT_MAX_TOKENS = 1024
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default of this endpoint

Body = schema.ChatBody | schema.CompletionBody


def create_app(
    models: Sequence[ServedModel],
    prompts: Prompts,
    backend: Backend,
    access: Access,
    *,
    request_timeout_s: float = 300.0,
) -> ASGIApp:
    """Build the application.

    Args:
        models: what is served.
        prompts: turns messages and texts into tokens.
        backend: generates.
        access: who may use what.
        request_timeout_s: longest time from a request's arrival to its last token.
    """
    endpoint = _Endpoint(models, prompts, backend, access, request_timeout_s)
    app = FastAPI(title="ftray", docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    app.add_api_route("/healthz", endpoint.health, methods=["GET"])
    app.add_api_route(_METRICS_PATH, endpoint.metrics_text, methods=["GET"])
    app.add_api_route("/v1/models", endpoint.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", endpoint.show_model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", endpoint.chat, methods=["POST"])
    app.add_api_route("/v1/completions", endpoint.complete, methods=["POST"])
    return _Shell(app, access)


class _Shell:
    """Outermost: authenticates every path but the open ones, and turns our own mistakes into a plain 500."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["path"] not in _OPEN_PATHS:
                headers = dict(scope["headers"])
                key = headers.get(b"authorization", b"").decode("latin-1")
                tenant = self._access.authenticate(key, metrics=scope["path"] == _METRICS_PATH)
                scope.setdefault("state", {})["tenant"] = tenant
            await self._app(scope, receive, watched)
        except RequestError as error:
            await errors.response(error)(scope, receive, send)
        except Exception as error:
            # Neither client nor log gets the message: it may quote a prompt.
            logger.error("internal error on %s: %s", scope["path"], errors.described(error))
            if not started:
                await errors.response(errors.internal())(scope, receive, send)


class _Endpoint:
    """The handlers."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        prompts: Prompts,
        backend: Backend,
        access: Access,
        request_timeout_s: float,
    ) -> None:
        self._prompts = prompts
        self._backend = backend
        self._access = access
        self._timeout_s = request_timeout_s
        self._bodies = Bodies()
        self._created = int(time.time())
        self._metrics = Metrics()
        self._known = frozenset(model.id for model in models)

    async def health(self) -> Response:
        """200 while the engine answers."""
        await self._backend.stats()
        info = await self._backend.info()
        return JSONResponse({"status": "ok", "engine": info.engine})

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus text."""
        self._metrics.observe_engine(await self._backend.stats())
        tenant = request.state.tenant
        visible = None if tenant is None else [model.id for model in self._access.models(tenant)]
        return Response(self._metrics.render(visible), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self, request: Request) -> Response:
        """What this tenant may name."""
        cards = [model_card(model, self._created) for model in self._access.models(request.state.tenant)]
        return JSONResponse({"object": "list", "data": cards})

    async def show_model(self, request: Request, name: str) -> Response:
        """One model."""
        return JSONResponse(model_card(self._access.find(request.state.tenant, name), self._created))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._counted(request, schema.ChatBody)

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._counted(request, schema.CompletionBody)

    async def _counted(self, request: Request, cls: Any) -> Response:
        label, status, deadline = UNKNOWN, 500, Deadline(self._timeout_s)
        try:
            async with deadline.kept(), self._bodies.read(request) as data:
                body = await _parsed(data, cls)
                model = self._access.find(request.state.tenant, body.model)
                label = model.id
                inner = await self._prepared(body, model)
                reply = Reply(inner.id, model, isinstance(body, schema.ChatBody), len(inner.prompt_ids))
                usage = body.include_usage if body.stream else None
                del data, body  # they may be large, and the answer may take long
            response = await self._answer(request, inner, reply, usage, deadline)
            status = response.status_code
            return response
        except RequestError as error:
            status = error.status
            raise
        except Unavailable:
            status = 503
            raise
        except stream.ClientGone:
            status = 499
            raise
        finally:
            self._metrics.requests.labels(label if label in self._known else UNKNOWN, status).inc()

    async def _prepared(self, body: Body, model: ServedModel) -> api.Request:
        """What the engine is asked."""
        info = await self._backend.info()
        ids = await self._prompts.tokens(body, info.max_length)
        most = _CHAT_MAX_TOKENS if isinstance(body, schema.ChatBody) else _COMPLETION_MAX_TOKENS
        sampling = body.sampling(min(max(1, info.max_length - len(ids)), most))
        return api.Request(id=uuid.uuid4().hex, prompt_ids=ids, delta=model.delta, sampling=sampling)

    async def _answer(
        self,
        request: Request,
        inner: api.Request,
        reply: Reply,
        include_usage: bool | None,
        deadline: Deadline,
    ) -> Response:
        """The whole answer if `include_usage` is None, else a stream of it."""
        outputs = self._timed(inner, reply.model, deadline)
        if include_usage is None:
            return await stream.unless_gone(request.receive, _whole(reply, outputs))
        # The first token is awaited here, so that whatever is refused gets a status and not a broken stream.
        try:
            first = await stream.unless_gone(request.receive, anext(outputs))
        except BaseException:
            await outputs.aclose()
            raise
        return stream.EventStream(_events(reply, first, outputs, include_usage), reply.headers)

    async def _timed(
        self, inner: api.Request, model: ServedModel, deadline: Deadline
    ) -> AsyncGenerator[api.Output, None]:
        """The backend's outputs, counted, within the time limit."""
        tokens, first = self._metrics.tokens, True
        outputs = self._backend.generate(inner)
        self._metrics.in_flight.inc()
        try:
            while True:
                async with deadline.kept():
                    output = await anext(outputs, None)
                if output is None:
                    return
                if first:
                    self._metrics.first_token.labels(model.id).observe(deadline.elapsed_s)
                    tokens.labels(model.id, "prompt").inc(len(inner.prompt_ids))
                    first = False
                tokens.labels(model.id, "completion").inc(len(output.token_ids))
                yield output
        finally:
            self._metrics.in_flight.dec()
            await outputs.aclose()


async def _whole(reply: Reply, outputs: AsyncGenerator[api.Output, None]) -> Response:
    parts, num_tokens, reason = [], 0, None
    try:
        async for output in outputs:
            _raise_if_failed(output)
            parts.append(output.text)
            num_tokens += len(output.token_ids)
            reason = output.finish_reason
    finally:
        await outputs.aclose()
    if reason is None:
        raise Unavailable("the answer ended early")
    return JSONResponse(reply.whole("".join(parts), reason, num_tokens), headers=reply.headers)


async def _events(
    reply: Reply, first: api.Output, outputs: AsyncGenerator[api.Output, None], include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """A stream's events. One that fails ends with an error event and without `[DONE]`."""
    num_tokens, output = 0, first
    try:
        _raise_if_failed(first)
        if reply.chat:
            yield stream.event(reply.chunk("", role=True))
        while True:
            num_tokens += len(output.token_ids)
            if output.text:
                yield stream.event(reply.chunk(output.text))
            if output.finish_reason is not None:
                break
            output = await anext(outputs)
            _raise_if_failed(output)
        yield stream.event(reply.chunk(None, output.finish_reason))
        if include_usage:
            yield stream.event(reply.usage_chunk(num_tokens))
        yield stream.DONE
    except RequestError as error:
        yield stream.error_event(error_body(error))
    except (Unavailable, StopAsyncIteration):
        yield stream.error_event(error_body(errors.unavailable("the engine went away during the answer")))
    except Exception as error:
        logger.error("stream failed: %s", errors.described(error))
        yield stream.error_event(error_body(errors.internal()))
    finally:
        await outputs.aclose()


def _raise_if_failed(output: api.Output) -> None:
    if output.finish_reason == "error":
        raise RequestError(output.error or "the engine failed", status=500, code="generation_failed")


async def _parsed(data: bytes, cls: type[schema.Body]) -> schema.Body:
    """A body; a large one is parsed off the event loop."""
    if len(data) <= _INLINE_BODY_BYTES:
        return schema.parse(data, cls)
    return await asyncio.to_thread(schema.parse, data, cls)
