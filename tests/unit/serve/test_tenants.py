"""Tenant times model: what each may see, and that the rest looks as if it were not there."""

import hashlib
import statistics
import time
from typing import Any

import httpx
import openai
import pytest

from ftray.config.serve import ServeConfig, TenantConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import parse
from ftray.serve.backend import ServedModel
from ftray.serve.tenants import EVERYBODY, Access

from .conftest import MODELS, Serve

ASK: list[Any] = [{"role": "user", "content": "hello"}]


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def tenant(name: str, deltas: list[str]) -> TenantConfig:
    return TenantConfig(name=name, key_sha256=sha256(f"key-{name}"), deltas=deltas)


TENANTS = [tenant("ann", ["alpha"]), tenant("bob", ["beta"]), tenant("cid", [])]


def test_each_tenant_sees_its_own(serve: Serve) -> None:
    seen = {"ann": ["base", "alpha"], "bob": ["base", "beta@1"], "cid": ["base"]}
    with serve(tenants=TENANTS) as server:
        for name, models in seen.items():
            client = server.client(f"key-{name}")
            assert [model.id for model in client.models.list().data] == models
            for model in ("base", "alpha", "alpha@3", "beta@1", "nobody"):
                if model.partition("@")[0] in {known.partition("@")[0] for known in models}:
                    assert client.chat.completions.create(model=model, messages=ASK).model in models
                else:
                    with pytest.raises(openai.NotFoundError):
                        client.chat.completions.create(model=model, messages=ASK)


def test_foreign_and_missing_look_the_same(serve: Serve) -> None:
    with serve(tenants=TENANTS) as server:

        def ask(model: str) -> str:
            headers = {"authorization": "Bearer key-bob"}
            response = server.post(
                "/v1/chat/completions", json={"model": model, "messages": ASK}, headers=headers
            )
            return f"{response.status_code} {response.text.replace(model, 'M')}"

        assert ask("alpha") == ask("nobody")


def test_foreign_and_missing_take_the_same_time(serve: Serve) -> None:
    times: dict[str, list[float]] = {"alpha": [], "nobody": []}
    with serve(tenants=TENANTS) as server:
        for _ in range(40):
            for model, seen in times.items():
                body = {"model": model, "messages": ASK}
                started = time.perf_counter()
                server.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer key-bob"})
                seen.append(time.perf_counter() - started)
    foreign, missing = (statistics.median(seen) for seen in times.values())
    assert abs(foreign - missing) < 0.25 * min(foreign, missing)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "key-ann", "Basic key-ann", "Bearer \xe9"]
)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/metrics", "/openapi.json", "/nothing"]
)
def test_nothing_but_health_is_open(tenant_url: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    response = httpx.get(tenant_url + path, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(tenant_url + "/healthz").status_code == 200


@pytest.fixture(scope="module")
def tenant_url(serve: Serve) -> Any:
    with serve(tenants=TENANTS) as server:
        yield server.url


def test_metrics_show_a_tenant_its_own_models(serve: Serve) -> None:
    with serve(tenants=TENANTS) as server:
        server.client("key-ann").chat.completions.create(model="alpha", messages=ASK)
        texts = {
            name: httpx.get(server.url + "/metrics", headers={"authorization": f"Bearer key-{name}"}).text
            for name in ("ann", "bob")
        }
    assert 'model="alpha"' in texts["ann"]
    assert "alpha" not in texts["bob"]
    assert "ftray_engine_running " not in texts["ann"]  # that is the load of everybody


def test_the_metrics_key_reads_all_metrics_and_nothing_else(serve: Serve) -> None:
    headers = {"authorization": "Bearer key-operator"}
    with serve(tenants=TENANTS, metrics_key_sha256=sha256("key-operator")) as server:
        server.client("key-ann").chat.completions.create(model="alpha", messages=ASK)
        text = httpx.get(server.url + "/metrics", headers=headers).text
        assert 'model="alpha"' in text
        assert "ftray_engine_running " in text
        for path in ("/v1/models", "/v1/models/base", "/metrics/", "/nothing"):
            assert httpx.get(server.url + path, headers=headers).status_code == 401
        body = {"model": "base", "messages": ASK}
        assert server.post("/v1/chat/completions", json=body, headers=headers).status_code == 401


def test_a_metrics_key_must_be_one_of_its_own() -> None:
    with pytest.raises(ConfigError, match="metrics"):
        Access(TENANTS, MODELS, TENANTS[0].key_sha256)
    with pytest.raises(ConfigError, match="metrics_key_sha256"):
        parse(ServeConfig, {"base": "x", "engine": "fake", "metrics_key_sha256": "0" * 64})


def test_the_base_answers_to_one_name_only() -> None:
    models = [ServedModel(id="base", ref="alpha", digest="x", is_base=True), *MODELS[1:]]
    assert Access([], models).find(EVERYBODY, "alpha").id == "alpha"


def test_tenants_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match="key"):
        Access([tenant("ann", []), TenantConfig(name="bob", key_sha256=tenant("ann", []).key_sha256)], MODELS)
    with pytest.raises(ConfigError, match="not served"):
        Access([tenant("ann", ["gamma"])], MODELS).check_deltas()


def test_beyond_loopback_needs_tenants() -> None:
    with pytest.raises(ConfigError, match="tenants"):
        parse(ServeConfig, {"base": "x", "host": "0.0.0.0", "engine": "fake"})
