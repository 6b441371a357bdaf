"""The endpoint as OpenAI's own client and a hostile one see it."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftray.core.errors import DeltaError
from ftray.engine.api import Output, Request
from ftray.engine.fake import FakeEngineConfig
from ftray.serve.backend import Unavailable
from ftray.serve.loop import EngineLoop

from .conftest import ASK, CHAT, COMPLETE, Serve, Server, chat_body


def test_models_are_listed(server: Server) -> None:
    listed = server.client().models.list().data
    assert [model.id for model in listed] == ["base", "alpha", "beta@1"]
    assert server.client().models.retrieve("alpha").id == "alpha"


@pytest.mark.parametrize(
    ("model", "answers", "digest"),
    [
        ("base", "base", "base"),
        ("alpha", "alpha", "aaaa"),
        ("alpha@3", "alpha", "aaaa"),
        ("beta@1", "beta", "bbbb"),
    ],
)
def test_each_model_answers_and_names_its_digest(
    server: Server, model: str, answers: str, digest: str
) -> None:
    raw = server.client().chat.completions.with_raw_response.create(model=model, messages=ASK, temperature=0)
    reply = raw.parse()
    assert reply.choices[0].message.content == f"Hi 🙂 from {answers}. END"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.system_fingerprint == raw.headers["x-ftray-digest"] == f"xxh3:{digest}"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len("hello\n")


@pytest.mark.parametrize("stop", [None, "END", ["🙂 f", "zzz"], "never"])
def test_a_stream_joins_to_the_same_text(server: Server, stop: Any) -> None:
    fields: Any = {"model": "alpha", "messages": ASK, "temperature": 0} | ({"stop": stop} if stop else {})
    whole = server.client().chat.completions.create(**fields)
    chunks = list(
        server.client().chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    parts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(parts) == whole.choices[0].message.content
    assert not any("\ufffd" in part for part in parts)
    assert chunks[-1].usage == whole.usage
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert {chunk.system_fingerprint for chunk in chunks} == {"xxh3:aaaa"}


def test_completions_take_text_and_tokens(server: Server) -> None:
    client = server.client()
    by_text = client.completions.create(model="base", prompt="hello", max_tokens=5)
    by_ids = client.completions.create(model="base", prompt=list(b"hello"), max_tokens=5)
    assert by_text.choices[0].text == by_ids.choices[0].text == "Hi "  # two more bytes begin the emoji
    assert by_text.choices[0].finish_reason == "length"
    streamed = client.completions.create(model="base", prompt="hello", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Hi "


def test_unknown_model_is_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().chat.completions.create(model="nobody", messages=ASK)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 129), ("logprobs", 3), ("top_logprobs", 3), ("top_logprobs", 21), ("logit_bias", {"1": 2}),
        ("tools", [{"type": "x"}]), ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tool_choice", "auto"), ("tool_choice", "required"), ("tool_choice", {"type": "function"}),
        ("presence_penalty", 2.5), ("repetition_penalty", 1e-40), ("frequency_penalty", float("inf")),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema"}), ("best_of", 2), ("functions", [{}]), ("audio", {}),
        ("top_k", -1), ("surprise", 1), ("temperature", 3), ("temperature", "hot"), ("temperature", float("nan")),
        ("top_p", 0), ("max_tokens", 0), ("max_tokens", True), ("max_tokens", "5"), ("seed", 2**63), ("stop", [""]),
        ("stop", ["a"] * 17), ("stream_options", {"include_usage": True}), ("messages", []), ("messages", "hi"),
        ("messages", [{"role": "tool", "content": "x"}]), ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": "x", "tool_call_id": "1"}]),
        ("messages", [{"role": "assistant"}]),
        ("messages", [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}]}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("messages", [{"role": "user", "content": "x", "name": "y"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]), ("model", None), ("model", "\ud800"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_not_built_is_400_and_named(server: Server, field: str, value: Any) -> None:
    response = server.post(CHAT, content=json.dumps(chat_body(**{field: value})))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "logprobs": False, "tools": [], "tool_choice": "none", "user": "x", "presence_penalty": 0.0},
        {"n": None, "stop": None, "max_tokens": None, "stream": None},
        {"messages": [{"role": "assistant", "content": "x", "refusal": None}, *ASK]},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, *ASK]},
        {"max_completion_tokens": 3},
    ],
)
def test_what_asks_for_nothing_special_is_taken(server: Server, fields: dict[str, Any]) -> None:
    assert server.post(CHAT, json=chat_body(**fields)).status_code == 200


def test_a_prompt_too_long_says_so(server: Server) -> None:
    for fields in ({"prompt": "x" * 5000}, {"prompt": "x", "max_tokens": 5000}):
        response = server.post(COMPLETE, json={"model": "base", **fields})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_token_ids_that_do_not_exist_are_refused(server: Server) -> None:
    for ids in ([257], [-1], [2**70]):
        response = server.post(COMPLETE, json={"model": "base", "prompt": ids})
        assert response.status_code == 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model":', b"[" * 100_000, b"1" * 10_000]
)
def test_bodies_that_are_no_object(server: Server, body: bytes) -> None:
    assert server.post(CHAT, content=body).status_code == 400


def test_paths_and_methods_that_are_not_there_have_openais_shape(server: Server) -> None:
    missing, method = httpx.get(server.url + "/v1/nothing"), httpx.get(server.url + CHAT)
    assert (missing.status_code, method.status_code) == (404, 405)
    assert "error" in missing.json()
    assert "error" in method.json()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = st.sampled_from(
    ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "n", "tools",
     "stream_options", "logit_bias", "user", "max_completion_tokens", "\x00",
     "\ud83d", "logprobs", "top_logprobs", "echo", "tool_choice",
     "presence_penalty", "top_k", "stop_token_ids", "min_tokens"]
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(_FIELDS, _JSON, max_size=3), chat=st.booleans())
def test_no_body_gives_a_5xx(server: Server, changes: dict[str, Any], chat: bool) -> None:
    body = chat_body() if chat else {"model": "base", "prompt": "x"}
    body = body | changes | {"max_tokens": 3}
    response = server.post(CHAT if chat else COMPLETE, content=json.dumps(body))
    assert response.status_code < 500, (changes, response.text)
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_bug_of_ours_is_a_500_without_its_words(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def planted(*_: Any) -> None:
        raise KeyError("secret prompt")

    monkeypatch.setattr("ftray.serve.prompts.Prompts.chat", planted)
    with serve() as server:
        response = server.post(CHAT, json=chat_body())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text + caplog.text
    assert "KeyError" in caplog.text


def test_prompts_are_not_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        server.post(CHAT, json=chat_body(messages=[{"role": "user", "content": "very-private"}]))
        server.post(CHAT, json=chat_body(messages=[{"role": "very-private", "content": "x"}]))
    assert "very-private" not in caplog.text


def test_a_stream_that_fails_ends_with_an_error_and_no_done(serve: Serve) -> None:
    engine = FakeEngineConfig(text="x" * 50).build("tiny")
    forward, calls = engine._runner.forward, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:
            raise RuntimeError("secret prompt")
        return forward(*arguments)

    engine._runner.forward = failing  # type: ignore[method-assign]
    with serve(engine=engine) as server:
        with pytest.raises(openai.APIError, match="engine failed"):
            list(server.client().chat.completions.create(model="base", messages=ASK, stream=True))
        text = server.post(CHAT, json=chat_body()).json()["choices"][0]["message"]["content"]
        assert text == "x" * 50  # the next request is answered
        server.wait_idle()


def test_an_engine_that_is_gone_is_503(serve: Serve) -> None:
    with serve() as server:
        assert httpx.get(server.url + "/healthz").status_code == 200
        server.loop.stop()
        response = server.post(CHAT, json=chat_body())
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_a_whole_answer_whose_engine_goes_away_is_asked_for_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it was sent, unlike of a stream that has begun."""
    generate, calls = EngineLoop.generate, []

    async def dying(self: EngineLoop, request: Request, **settings: Any) -> AsyncGenerator[Output, None]:
        calls.append(request.id)
        async with contextlib.aclosing(generate(self, request, **settings)) as outputs:
            async for output in outputs:
                yield output
                if len(calls) % 2:
                    await asyncio.sleep(0.3)  # what there is has been sent by then
                    raise Unavailable("killed")

    monkeypatch.setattr(EngineLoop, "generate", dying)
    with serve() as server:
        reply = server.client().chat.completions.create(model="base", messages=ASK)
        assert reply.choices[0].message.content == "Hello from base."
        assert reply.usage is not None and reply.usage.completion_tokens == len("Hello from base.") + 1
        assert "event: error" in server.post(CHAT, json=chat_body(stream=True)).text
        assert len(calls) == 3
        server.wait_idle()


def test_many_at_once_get_their_own_answers(serve: Serve) -> None:
    with serve(text="I am {model}.", max_num_seqs=4, step_s=0.001) as server:
        answers: dict[int, str] = {}

        def ask(number: int) -> None:
            model = ("base", "alpha", "beta@1")[number % 3]
            reply = server.client().chat.completions.create(model=model, messages=ASK, stream=number % 2 == 0)
            if number % 2 == 0:
                answers[number] = "".join(chunk.choices[0].delta.content or "" for chunk in reply)  # type: ignore[union-attr]
            else:
                answers[number] = reply.choices[0].message.content  # type: ignore[union-attr]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {n: f"I am {('base', 'alpha', 'beta')[n % 3]}." for n in range(24)}
        server.wait_idle()


def test_metrics_count_with_bounded_labels(serve: Serve) -> None:
    with serve() as server:
        server.post(CHAT, json=chat_body())
        for number in range(5):
            server.post(CHAT, json=chat_body(model=f"made-up-{number}"))
        text = httpx.get(server.url + "/metrics").text
        assert 'ftray_requests_total{model="base",status="200",tenant=""} 1.0' in text
        assert 'ftray_requests_total{model="unknown",status="404",tenant=""} 5.0' in text
        assert "made-up" not in text
        assert "ftray_engine_blocks_used 0.0" in text


def test_health_is_quick_while_the_engine_works(serve: Serve) -> None:
    with serve(text="x" * 500, step_s=0.05) as server:
        thread = threading.Thread(target=lambda: server.post(CHAT, json=chat_body(max_tokens=10)))
        thread.start()
        start = time.monotonic()
        assert httpx.get(server.url + "/healthz").status_code == 200
        assert time.monotonic() - start < 0.5
        thread.join()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("answered", ["xxh3:bbbb", ""])
def test_what_another_delta_answers_is_no_answer(serve: Serve, stream: bool, answered: str) -> None:
    with serve() as server:
        server.engine._slots.find("xxh3:aaaa").digest = answered
        response = server.post(CHAT, json=chat_body(model="alpha", stream=stream))
        assert '"wrong_model"' in response.text and "[DONE]" not in response.text
        assert "Hello" not in response.text
        assert response.status_code == (200 if stream else 500)


@pytest.mark.parametrize("stream", [True, False])
def test_no_reply_speaks_of_folders_here(
    serve: Serve, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(folder: str) -> Any:
        raise DeltaError("/srv/cache/alpha-1/adapter.safetensors: damaged")

    with serve() as server:
        server.engine.unload_delta("xxh3:aaaa")
        server.engine.register_delta("xxh3:aaaa", "/srv/cache/alpha-1")
        server.engine._runner.read = broken
        response = server.post(CHAT, json=chat_body(model="alpha", stream=stream))
    assert (
        '"model_unusable"' in response.text and "/srv" not in response.text and "damaged" not in response.text
    )
    assert "/srv/cache/alpha-1" in caplog.text


def test_a_mistake_on_this_machine_is_ours_and_not_spelled(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise DeltaError("/srv/registry: not readable")

    with serve() as server:
        monkeypatch.setattr(server.front.access, "find", broken)
        response = server.post(CHAT, json=chat_body())
    assert (response.status_code, "/srv" in response.text) == (500, False)
