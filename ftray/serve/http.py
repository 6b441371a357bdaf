"""The HTTP API, OpenAI's as far as it is built, over whatever generates."""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from ftray.core.errors import RequestError
from ftray.engine import api
from ftray.serve import errors, openapi, schema, stream
from ftray.serve.answers import Answers, Outputs, outputs_of
from ftray.serve.backend import Backend, Unavailable
from ftray.serve.choices import Choice, Echo
from ftray.serve.exchange import Exchange
from ftray.serve.front import Front
from ftray.serve.limits import Bodies, Deadline
from ftray.serve.metrics import Metrics
from ftray.serve.prompts import Prompts
from ftray.serve.quota import Gate
from ftray.serve.replies import Reply, model_card
from ftray.serve.shell import METRICS_PATH, Shell
from ftray.serve.tenants import Caller
from ftray.serve.toolcalls import ToolCalls
from ftray.serve.usage import UsageLog

_INLINE_BODY_BYTES = 32 * 2**10
_CHAT_MAX_TOKENS = 1024
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default of this endpoint
_LAST_EVENT_S = 5.0
"""After a request's time is over: for the event that says so to be sent."""

Body = schema.ChatBody | schema.CompletionBody
MakeAnswers = Callable[[], Answers]


def create_app(
    front: Front,
    prompts: Prompts,
    backend: Backend,
    gate: Gate,
    usage: UsageLog,
    *,
    request_timeout_s: float = 300.0,
) -> ASGIApp:
    """Build the application.

    Args:
        front: what is served, and to whom; it may change while the application runs.
        prompts: turns messages and texts into tokens.
        backend: generates.
        gate: admits requests within their tenants' quotas.
        usage: where requests are written down.
        request_timeout_s: longest time from a request's arrival to its last token.
    """
    endpoint = _Endpoint(front, prompts, backend, gate, usage, request_timeout_s)
    app = FastAPI(title="ftray", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    errors.install(app)
    app.add_api_route("/healthz", endpoint.health, methods=["GET"])
    app.add_api_route(METRICS_PATH, endpoint.metrics_text, methods=["GET"])
    app.add_api_route("/openapi.json", endpoint.openapi, methods=["GET"])
    app.add_api_route("/v1/models", endpoint.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", endpoint.show_model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", endpoint.chat, methods=["POST"])
    app.add_api_route("/v1/completions", endpoint.complete, methods=["POST"])
    return Shell(app, front)


class _Endpoint:
    """The handlers."""

    def __init__(
        self,
        front: Front,
        prompts: Prompts,
        backend: Backend,
        gate: Gate,
        usage: UsageLog,
        request_timeout_s: float,
    ) -> None:
        self._front = front
        self._prompts = prompts
        self._backend = backend
        self._gate = gate
        self._usage = usage
        self._timeout_s = request_timeout_s
        self._bodies = Bodies()
        self._created = int(time.time())
        self._metrics = Metrics(lambda name: front.access.is_tenant(name))

    async def health(self) -> Response:
        """200 while the engine answers and there is something to serve."""
        self._front.check_open()
        if not self._front.view.models:
            raise Unavailable("nothing is loaded yet")
        await self._backend.stats()
        info = await self._backend.info()
        return JSONResponse({"status": "ok", "engine": info.engine})

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus text."""
        self._metrics.observe_engine(await self._backend.stats())
        tenant: Caller = request.state.caller
        text = self._metrics.render(tenant.name or None)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self) -> Response:
        """What this API takes, as OpenAPI."""
        return JSONResponse(openapi.document())

    async def list_models(self, request: Request) -> Response:
        """What this tenant may name."""
        models = self._front.access.models(request.state.caller)
        return JSONResponse(
            {"object": "list", "data": [model_card(model, self._created) for model in models]}
        )

    async def show_model(self, request: Request, name: str) -> Response:
        """One model."""
        model = self._front.access.find(request.state.caller, name)
        return JSONResponse(model_card(model, self._created))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._counted(request, schema.ChatBody)

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._counted(request, schema.CompletionBody)

    async def _counted(self, request: Request, cls: Any) -> Response:
        """Answer a request and write it down, whatever becomes of it."""
        exchange = Exchange(
            uuid.uuid4().hex,
            request.state.caller,
            Deadline(self._timeout_s),
            self._front.in_flight,
            self._metrics,
            self._usage,
        )
        status = 500
        try:
            response = await self._answered(request, exchange, cls)
            status = response.status_code
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
            if status != 200 or not isinstance(response, stream.EventStream):
                exchange.end(status)
        return response

    async def _answered(self, request: Request, exchange: Exchange, cls: Any) -> Response:
        self._front.check_open()
        async with exchange.deadline.kept():
            exchange.admission = await self._gate.enter(exchange.caller.tenant)
            async with self._bodies.read(request) as data:
                body = await _parsed(data, cls)
                exchange.bind(self._front.access.find(exchange.caller, body.model))
                make = await self._prepared(body, exchange)
                usage = body.include_usage if body.stream else None
                del data, body  # they may be large, and the answer may take long
        if usage is None:
            return await stream.unless_gone(request.receive, _whole(make, exchange))
        answers = make()
        first = await stream.unless_gone(request.receive, answers.first())
        events = answers.events(first, include_usage=usage)
        within = exchange.deadline.kept(_LAST_EVENT_S)
        headers = answers.reply.headers
        return stream.EventStream(events, headers, lambda: exchange.end(answers.status), within)

    async def _prepared(self, body: Body, exchange: Exchange) -> MakeAnswers:
        """What makes the answers to come; nothing is asked of an engine before they are read."""
        assert exchange.model is not None
        max_length = (await self._backend.info()).max_length
        chat = isinstance(body, schema.ChatBody)
        if isinstance(body, schema.ChatBody):
            prompts = [await self._prompts.chat(body, max_length)]
        else:
            prompts = await self._prompts.completions(body, max_length)
        requests = self._requests(body, prompts, exchange, max_length)
        num_choices = sum(request.sampling.n for request in requests)
        if num_choices > schema.MAX_CHOICES:
            message = f"n: {num_choices} answers in one request; ask for at most {schema.MAX_CHOICES}"
            raise RequestError(message, param="n")
        exchange.usage.prompt_tokens = sum(len(prompt) for prompt in prompts)
        answer_tokens = sum(request.sampling.max_tokens * request.sampling.n for request in requests)
        assert exchange.admission is not None
        await exchange.admission.reserve(exchange.usage.prompt_tokens + answer_tokens)
        reply = Reply(exchange.id, exchange.model, chat, exchange.usage)
        makers = [await self._choices(body, request, number) for number, request in enumerate(requests)]

        def make() -> Answers:
            choices = [choice for maker in makers for choice in maker()]
            # An engine may still hold what it was asked before.
            asked = [dataclasses.replace(request, id=uuid.uuid4().hex) for request in requests]
            return Answers(reply, choices, self._timed(asked, exchange), num_prompts=len(asked))

        return make

    def _requests(
        self, body: Body, prompts: Sequence[list[int]], exchange: Exchange, max_length: int
    ) -> list[api.Request]:
        assert exchange.model is not None
        most = _CHAT_MAX_TOKENS if isinstance(body, schema.ChatBody) else _COMPLETION_MAX_TOKENS
        tenant = exchange.caller.tenant
        return [
            api.Request(
                id=f"{exchange.id}-{number}",
                prompt_ids=prompt,
                delta=exchange.model.delta,
                sampling=body.sampling(min(max(1, max_length - len(prompt)), most)),
                tenant=exchange.caller.name,
                weight=tenant.weight if tenant else 1.0,
                group=exchange.id,
            )
            for number, prompt in enumerate(prompts)
        ]

    async def _choices(self, body: Body, request: api.Request, number: int) -> Callable[[], list[Choice]]:
        """What makes the answers to one prompt; it holds none of the body, which may be large."""
        echo, tools, chat, single = None, [], isinstance(body, schema.ChatBody), False
        if isinstance(body, schema.ChatBody):
            tools = [tool.function.name for tool in body.active_tools]
            single = body.parallel_tool_calls is False
        elif body.echo:
            text = await self._prompts.spell(list(request.prompt_ids))
            echo = Echo(text=text, prompt_ids=request.prompt_ids, logprobs=body.logprobs is not None)
        n, texts = request.sampling.n, self._prompts.texts
        return lambda: [
            Choice(
                number * n + index,
                texts,
                chat=chat,
                echo=echo,
                tool_calls=ToolCalls(tools, single=single) if tools else None,
            )
            for index in range(n)
        ]

    async def _timed(self, requests: Sequence[api.Request], exchange: Exchange) -> Outputs:
        """The engines' outputs, within the time limit."""
        outputs = outputs_of(self._backend, requests)
        exchange.sent = True
        try:
            while True:
                async with exchange.deadline.kept():
                    item = await anext(outputs, None)
                if item is None:
                    return
                exchange.first_token()
                yield item
        finally:
            await outputs.aclose()


async def _whole(make: MakeAnswers, exchange: Exchange) -> Response:
    """A complete response; one whose engine goes away is asked for again, the client having seen nothing of it."""
    try:
        return await make().whole()
    except Unavailable:
        exchange.usage.completion_tokens = exchange.usage.cached_tokens = 0
        return await make().whole()


async def _parsed(data: bytes, cls: type[schema.Body]) -> schema.Body:
    """A body; a large one is parsed off the event loop."""
    if len(data) <= _INLINE_BODY_BYTES:
        return schema.parse(data, cls)
    return await asyncio.to_thread(schema.parse, data, cls)
