"""The registry changes under a running endpoint: answers follow within seconds; only the digest tells."""

import hashlib
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ftray.serve.hold import _Failure

from .conftest import ASK, CHAT
from .local import ADMIN, Local, Versions, local_endpoint

TOKEN = hashlib.sha256(ADMIN.encode()).hexdigest()


@pytest.fixture
def versions(tiny_adapters: dict[str, Path], tmp_path: Path) -> Versions:
    """`a` with one version, which is `a@prod`."""
    versions = Versions(tiny_adapters["a"], tmp_path)
    versions.registry.promote(versions.publish("a"), "prod")
    return versions


def config(**fields: Any) -> dict[str, Any]:
    return {"deltas": ["a@prod"], "admin_token_sha256": TOKEN} | fields


def digest(versions: Versions, ref: str) -> str:
    return versions.registry.show(ref).digest


def test_promote_and_rollback_are_followed(versions: Versions) -> None:
    with local_endpoint(versions, config()) as local:
        assert local.ask("a@prod") == local.ask("a@1") == ("I am 1.", digest(versions, "a@1"))
        second = versions.publish("a")
        assert local.ask("a@prod")[0] == "I am 1."  # published is not promoted
        versions.registry.promote(second, "prod")
        local.wait(lambda: local.ask("a@prod") == ("I am 2.", digest(versions, "a@2")))
        with pytest.raises(openai.NotFoundError):
            local.ask("a@1")
        versions.registry.rollback("a", "prod")
        local.wait(lambda: local.ask("a@prod") == ("I am 1.", digest(versions, "a@1")))
        local.wait(lambda: local.loaded() == [[digest(versions, "a@1")]] * 2)  # the other was let go


def test_a_bare_name_follows_the_newest_version_and_all_aliases(versions: Versions) -> None:
    with local_endpoint(versions, config(deltas=["a"])) as local:
        versions.publish("a")
        local.wait(lambda: local.ask("a")[0] == "I am 2.")
        assert local.ask("a@prod")[0] == "I am 1."
        versions.registry.promote("a@2", "canary")
        local.wait(lambda: "a@canary" in {model.id for model in local.front.view.models})
        assert {model.id for model in local.client().models.list()} == {"base", "a", "a@prod", "a@canary"}


def test_what_is_in_flight_ends_on_the_old_version(versions: Versions) -> None:
    with local_endpoint(versions, config(), text="I am {model}. " * 12, step_s=0.01) as local:
        stream = local.client().chat.completions.create(model="a@prod", messages=ASK, stream=True)
        first = next(iter(stream))
        versions.registry.promote(versions.publish("a"), "prod")
        local.wait(lambda: local.ask("a@prod", max_tokens=8)[1] == digest(versions, "a@2"))
        rest = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in rest)
        assert set(text.split(". ")) - {"", "I am 1"} == set()
        assert {chunk.system_fingerprint for chunk in [first, *rest]} == {digest(versions, "a@1")}
        assert rest[-1].choices[0].finish_reason == "stop"
        local.wait(lambda: local.loaded() == [[digest(versions, "a@2")]] * 2)


class Load:
    """Clients that ask all the while, and what they saw."""

    def __init__(self, local: Local, num_clients: int = 4) -> None:
        self.local = local
        self.problems: list[str] = []
        self.seen: list[tuple[str, str]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(at,)) for at in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=20) as client:
            while not self._stop.is_set():
                body = {"model": "a@prod", "messages": ASK, "temperature": 0, "stream": number % 2 == 0}
                response = client.post(self.local.url + CHAT, json=body)
                if response.status_code != 200 or "error" in response.text:
                    self.problems.append(f"{response.status_code} {response.text[:200]}")
                elif number % 2:
                    text = response.json()["choices"][0]["message"]["content"]
                    self.seen.append((text, response.headers["x-ftray-digest"]))
                elif not response.text.endswith("data: [DONE]\n\n"):
                    self.problems.append("a stream without its end")
                else:
                    self.seen.append((streamed(response.text), response.headers["x-ftray-digest"]))


def streamed(text: str) -> str:
    """The answer in a stream's events, which all name one digest."""
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert len({chunk["system_fingerprint"] for chunk in chunks}) == 1
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def hot_publish(versions: Versions, number: int) -> Load:
    with local_endpoint(versions, config()) as local, Load(local) as load:
        for _ in range(number):
            ref = versions.publish("a")
            versions.registry.promote(ref, "prod")
            local.wait(lambda ref=ref: local.ask("a@prod")[1] == digest(versions, ref), 10)  # type: ignore[misc]
        local.wait(
            lambda: local.loaded() == [[digest(versions, "a@prod")]] * 2
        )  # nothing old is left anywhere
    return load


def check_each_answer_is_of_one_version(versions: Versions, load: Load, number: int) -> None:
    assert load.problems == []
    of_digest = {digest(versions, f"a@{n}"): f"I am {n}." for n in range(1, number + 2)}
    assert len(load.seen) > number
    assert all(of_digest[answered] == text for text, answered in load.seen)


def test_hot_publishes_under_load(versions: Versions) -> None:
    check_each_answer_is_of_one_version(versions, hot_publish(versions, 3), 3)


@pytest.mark.slow
def test_fifty_hot_publishes_under_load(versions: Versions) -> None:
    check_each_answer_is_of_one_version(versions, hot_publish(versions, 50), 50)


def test_bad_versions_never_answer_and_disturb_nobody(versions: Versions) -> None:
    with local_endpoint(versions, config()) as local, Load(local) as load:
        bad = versions.publish("a", "nan")
        versions.registry.promote(bad, "prod")
        local.wait(lambda: bool(local.control.rollout.rejected))
        (row,) = local.admin("GET", "/admin/status").json()["rejected"]
        assert (row["ref"], "finite" in row["problem"]) == (bad, True)
        damaged = versions.publish("a")
        weights = versions.registry.show(damaged).path / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8] + b"damaged!")
        versions.registry.alias("a", "prod", 3)
        local.wait(lambda: "a@prod" in local.control.problems)
        assert local.ask("a@prod")[0] == "I am 1."
        good = versions.publish("a")
        versions.registry.promote(good, "prod")
        local.wait(lambda: local.ask("a@prod")[0] == "I am 4.")
        assert local.control.problems == local.control.rollout.rejected == {}
    assert load.problems == []
    assert {text for text, _ in load.seen} <= {"I am 1.", "I am 4."}


def test_a_version_must_answer_its_questions(versions: Versions) -> None:
    golden = [{"delta": "a", "prompt": "Who?", "contains": "1"}]
    with local_endpoint(versions, config(golden=golden)) as local:
        versions.registry.promote(versions.publish("a"), "prod")
        local.wait(lambda: bool(local.control.rollout.rejected))
        assert "golden" in next(iter(local.control.rollout.rejected.values()))
        assert local.ask("a@prod")[0] == "I am 1."


def test_a_replica_that_lacks_a_delta_leaves_its_requests_to_another(versions: Versions) -> None:
    with local_endpoint(versions, config()) as local:
        wanted = digest(versions, "a@1")
        for lacking, other in (local.engines, local.engines[::-1]):
            holders = [engine._follower._holder for engine in (lacking, other)]
            holders[0].loaded -= {wanted}
            holders[0]._failures[wanted] = _Failure("the disk is broken", True, 1.0, math.inf)
            assert all(local.ask("a@prod")[0] == "I am 1." for _ in range(4))
            holders[0]._failures.clear()
            local.wait(lambda: wanted in holders[0].loaded)  # noqa: B023


@pytest.fixture
def admin(versions: Versions, tmp_path: Path) -> Iterator[Local]:
    versions.publish("b")
    settings = config(tenants_file=str(tmp_path / "tenants.json"))
    with local_endpoint(versions, settings) as local:
        yield local


def test_deltas_are_loaded_and_unloaded(admin: Local, versions: Versions) -> None:
    key = admin.admin("POST", "/admin/tenants", json={"name": "ann", "deltas": ["a", "b"]}).json()["key"]
    client = admin.client(key)

    def models() -> set[str]:
        try:
            return {model.id for model in client.models.list()}
        except openai.AuthenticationError:
            return set()  # the front has yet to hear of the tenant

    admin.wait(lambda: models() == {"base", "a@prod"})
    assert admin.admin("POST", "/admin/load", json={"model": "b@1"}).status_code == 202
    admin.wait(lambda: models() == {"base", "a@prod", "b@1"})
    assert client.chat.completions.create(model="b@1", messages=ASK).system_fingerprint == digest(
        versions, "b@1"
    )
    assert admin.admin("POST", "/admin/unload", json={"model": "b@1"}).status_code == 202
    admin.wait(lambda: models() == {"base", "a@prod"})
    admin.wait(lambda: admin.loaded() == [[digest(versions, "a@1")]] * 2)
    for path, body in (
        ("load", {"model": "nobody"}),
        ("load", {"model": "../x"}),
        ("unload", {"model": "b"}),
    ):
        assert admin.admin("POST", f"/admin/{path}", json=body).status_code in (400, 404)


def test_tenants_come_and_go_while_it_runs(admin: Local) -> None:
    made = admin.admin("POST", "/admin/tenants", json={"name": "ann", "deltas": ["a"]})
    first = made.json()["key"]

    def status(key: str) -> int:
        return httpx.get(f"{admin.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    admin.wait(lambda: status(first) == 200)
    second = admin.admin("POST", "/admin/tenants/ann/rotate").json()["key"]
    admin.wait(lambda: (status(first), status(second)) == (401, 200))
    listed = admin.admin("GET", "/admin/tenants").json()["tenants"][0]
    assert listed["name"] == "ann" and second not in str(listed)
    key_id = listed["keys"][0]["id"]
    assert admin.admin("DELETE", f"/admin/tenants/ann/keys/{key_id}").status_code == 200
    admin.wait(lambda: status(second) == 401)
    assert admin.admin("DELETE", "/admin/tenants/ann").status_code == 200
    assert admin.admin("DELETE", "/admin/tenants/ann").status_code == 400
    assert admin.admin("POST", "/admin/tenants", json={"name": "A b"}).status_code == 400


def test_the_admin_api_is_closed_without_its_token_and_absent_from_the_endpoint(admin: Local) -> None:
    for method, path in (("GET", "/admin/status"), ("POST", "/admin/drain"), ("GET", "/"), ("GET", "/docs")):
        assert admin.admin(method, path, token="wrong").status_code == 401
        assert httpx.request(method, admin.admin_url + path).status_code == 401
        assert (
            httpx.request(method, admin.url + path).status_code == 401
        )  # the endpoint's own, where keys are asked
    assert admin.admin_url.startswith("http://127.0.0.1:")


def test_draining_lets_answers_end_and_takes_no_more(versions: Versions) -> None:
    with local_endpoint(versions, config(), text="x" * 60, step_s=0.01) as local:
        stream = local.client().chat.completions.create(model="a@prod", messages=ASK, stream=True)
        next(iter(stream))
        assert local.admin("POST", "/admin/drain").json()["in_flight"] >= 1
        local.wait(lambda: local.front.view.draining)
        refused = httpx.post(local.url + CHAT, json={"model": "base", "messages": ASK})
        assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
        assert httpx.get(local.url + "/healthz").status_code == 503
        assert list(stream)[-1].choices[0].finish_reason == "stop"
        local.wait(lambda: local.control.drain() == 0)


def test_what_drains_too_long_ends_with_an_error(versions: Versions) -> None:
    with local_endpoint(versions, config(), text="x" * 3000, step_s=0.01) as local:
        body = {"model": "a@prod", "messages": ASK, "stream": True, "max_tokens": 3000}
        with httpx.stream("POST", local.url + CHAT, json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            local.control.drain()
            local.control.end()
            rest = list(lines)
        assert "event: error" in rest and "data: [DONE]" not in rest
