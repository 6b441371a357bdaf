"""What a hostile client tries: names, routes, headers, templates, generated requests of every shape."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from ftray.config.tenant import KeyConfig, Scope, TenantConfig
from ftray.core.errors import RequestError
from ftray.model.tokenizer import load_tokenizer
from ftray.serve import openapi
from ftray.serve.messages import Message
from ftray.serve.prompts import Prompts
from ftray.serve.schema import ChatBody, CompletionBody
from ftray.serve.shell import ROUTES

from .conftest import CHAT, COMPLETE, Serve, Server, chat_body
from .test_tenants import TENANTS, sha256

HOSTILE = [
    "..",
    "../../etc/passwd",
    "%2e%2e%2f",
    "a%00b",
    "a\x00b",
    "a/b",
    "ａ",
    "a" * 10_000,
    "alpha@../3",
    "alpha@",
    "@",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_looked_up_and_never_opened(server: Server, name: str) -> None:
    response = server.post(CHAT, json=chat_body(model=name))
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    quoted = httpx.URL(server.url).copy_with(raw_path=b"/v1/models/" + _quoted(name))
    assert httpx.get(quoted).status_code in (404, 400)


def _quoted(name: str) -> bytes:
    from urllib.parse import quote

    return quote(name, safe="%").encode()


def test_every_route_but_health_asks_for_a_key(serve: Serve) -> None:
    with serve(tenants=TENANTS) as server, httpx.Client() as client:
        paths = [path.replace("{model}", "base") for path in openapi.document()["paths"]]
        assert len(paths) >= 6
        for path in [
            *paths,
            "/docs",
            "/redoc",
            "/openapi.json",
            "/admin/status",
            "//v1/models",
            "/healthz/",
            "/v1",
        ]:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
                response = client.request(method, server.url + path, headers={"host": "127.0.0.1/healthz"})
                assert response.status_code == 401 or path == "/healthz", (method, path)
        for headers in (
            {"host": "x/healthz"},
            {"x-original-url": "/healthz", "x-forwarded-path": "/healthz"},
            {"x-forwarded-for": "127.0.0.1"},
        ):
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
        assert httpx.get(f"{server.url}/v1/models?x=/healthz").status_code == 401
        assert httpx.get(f"{server.url}/healthz").status_code == 200


ODD = [
    "{}%0A", "{}%0a", "{}%0D%0A", "{}%0A%0A", "{}%00", "{}%20", "{}/", "{}//", "/{}", "{}%2F", "{}%2f", "{}%3F",
    "{}/.", "/x/..{}", "/v1/.{}", "{}%23", "{};a",
]  # fmt: skip
"""Spellings of a path that are not the path."""


def scoped(*scopes: Scope) -> TenantConfig:
    key = KeyConfig(sha256=sha256("key-scoped"), scopes=list(scopes))
    return TenantConfig(name="ann", keys=[key], deltas=["alpha"])


@pytest.mark.parametrize("prefix", ["", "/svc"])
def test_no_spelling_of_a_path_gets_around_a_keys_scopes(serve: Serve, prefix: str) -> None:
    headers = {"authorization": "Bearer key-scoped"}
    bodies = {CHAT: chat_body(), COMPLETE: {"model": "base", "prompt": "x"}, "/metrics": None}
    with serve(tenants=[scoped("models")]) as server:
        client = TestClient(server.app, root_path=prefix)
        assert client.get(f"{prefix}/v1/models", headers=headers).status_code == 200
        assert client.get(f"{prefix}/v1/models/alpha", headers=headers).status_code == 200
        for path, body in bodies.items():
            method = "POST" if body else "GET"
            assert client.request(method, prefix + path, json=body, headers=headers).status_code == 403
            for odd in [*(shape.format(path) for shape in ODD), path.upper(), path.replace("/", "%2F")]:
                response = client.request(method, prefix + odd, json=body, headers=headers)
                assert response.status_code in (403, 404), odd
                assert response.json()["error"]["code"] in ("not_found", "insufficient_scope"), odd


def test_every_route_has_its_scope() -> None:
    paths = {path for path in openapi.document()["paths"] if "{" not in path}
    assert paths - {"/healthz"} == set(ROUTES) - {"/openapi.json"}


def test_what_is_no_http_is_closed() -> None:
    from starlette.websockets import WebSocketDisconnect

    from ftray.serve.front import Front, View
    from ftray.serve.shell import Shell

    async def never(*_: Any) -> None:
        raise AssertionError

    client = TestClient(Shell(never, Front(View(models=[], tenants=TENANTS))))
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/models"):
        pass


@pytest.mark.parametrize("field", ["chat_template", "chat_template_kwargs", "trust_remote_code", "documents"])
def test_no_template_comes_from_a_request(server: Server, field: str) -> None:
    response = server.post(CHAT, json=chat_body(**{field: "{{ 1 }}"}))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unknown_parameter")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_bases_template_runs_in_a_sandbox(tiny_base: Path, template: str) -> None:
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.chat_template = template + "{{ messages[0].content }}"
    body = ChatBody(model="base", messages=[Message(role="user", content="x")])
    with pytest.raises(RequestError):
        asyncio.run(Prompts(tokenizer).chat(body, 4096))


@pytest.fixture(scope="module")
def real(serve: Serve, tiny_base: Path) -> Iterator[Server]:
    """An endpoint over a base's own tokenizer and chat template, which writes tools as JSON."""
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + str(
        tokenizer.chat_template
    )
    with serve(tokenizer=tokenizer) as server:
        yield server


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": [value]}
    return value


def with_tool(parameters: Any) -> dict[str, Any]:
    return chat_body(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])


def with_call(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    turns = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ]
    return chat_body(messages=[{"role": "user", "content": "x"}, *turns])


@pytest.mark.parametrize("depth", [25, 40, 300, 450])
@pytest.mark.parametrize("body", [with_tool, with_call])
def test_what_is_nested_deeply_is_refused(real: Server, body: Any, depth: int) -> None:
    response = real.post(CHAT, json=body(nested(depth)))
    assert response.status_code == (200 if depth == 25 else 400)
    if depth > 25:
        assert "nested" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"properties": []},
        {"properties": {"x": 1}},
        {"type": "\x00"},
        {"required": 1},
        {"": {}},
        {"a": 1e308},
    ],
)
def test_odd_tools_reach_a_real_template(real: Server, parameters: Any) -> None:
    assert real.post(CHAT, json=with_tool(parameters)).status_code in (200, 400)


def test_generated_requests_to_a_real_template_give_no_5xx(real: Server) -> None:
    check_none_is_ours(campaign(real, 4, CHAT))


def campaign(server: Server, max_examples: int, path: str = "/") -> list[tuple[int, str]]:
    """Ask what schemathesis makes of our own document, fitting it and not; returns every status and text."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    seen: list[tuple[int, str]] = []
    session = requests.Session()
    for result in schema.get_all_operations():
        operation = result.ok()
        if not operation.path.startswith(path):
            continue
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=max_examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
            def ask(case: Any, known: bool) -> None:
                if known and isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = "base"
                response = case.call(base_url=server.url, session=session, timeout=30)
                seen.append((response.status_code, response.text))

            try:
                ask()
            except schemathesis.errors.InvalidSchema:
                continue
            except Exception as error:  # nothing that does not fit can be made, of a path without parameters
                if "Unsatisfiable" not in type(error).__name__:
                    raise
    return seen


def check_none_is_ours(seen: list[tuple[int, str]]) -> None:
    assert [row for row in seen if row[0] >= 500] == []


def test_generated_requests_give_no_5xx(server: Server) -> None:
    seen = campaign(server, 8)
    check_none_is_ours(seen)
    assert {200, 400, 404} <= {status for status, _ in seen}


@pytest.mark.slow
def test_many_generated_requests_give_no_5xx(server: Server) -> None:
    check_none_is_ours(campaign(server, 400))


def test_a_planted_bug_is_found(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(self: CompletionBody) -> list[str]:
        raise ZeroDivisionError("secret prompt")

    monkeypatch.setattr(CompletionBody, "prompts", property(planted))
    with serve() as server:
        seen = campaign(server, 8, COMPLETE)
    with pytest.raises(AssertionError):
        check_none_is_ours(seen)
    assert all("secret" not in text for _, text in seen)
