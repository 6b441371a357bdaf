"""What is written down of requests: tenant, delta and tokens, never a word of a prompt or a key."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ftray.serve import metrics
from ftray.serve.metrics import Metrics

from .conftest import CHAT, COMPLETE, Serve, chat_body
from .test_tenants import TENANTS


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()]


def test_every_request_has_its_line(serve: Serve, tmp_path: Path) -> None:
    headers = {"authorization": "Bearer key-ann"}
    with serve(tenants=TENANTS, usage_folder=str(tmp_path)) as server:
        server.post(CHAT, json=chat_body(model="alpha"), headers=headers)
        server.post(CHAT, json=chat_body(model="alpha@3", stream=True), headers=headers)
        while server.front.in_flight:  # a stream is written down after its last byte
            time.sleep(0.01)
        server.post(CHAT, json=chat_body(model="beta@1"), headers=headers)  # foreign
        server.post(CHAT, content=b"{", headers=headers)
        server.post(COMPLETE, json={"model": "base", "prompt": ["a", "b"], "max_tokens": 3}, headers=headers)
        server.wait_idle()
    found = records(tmp_path)
    assert [(row["status"], row["model"], row["digest"]) for row in found] == [
        (200, "alpha", "xxh3:aaaa"),
        (200, "alpha", "xxh3:aaaa"),
        (404, None, None),
        (400, None, None),
        (200, "base", "xxh3:base"),
    ]
    length = len("Hello from alpha.") + 1  # and the end
    assert [(row["prompt_tokens"], row["completion_tokens"]) for row in found] == [
        (6, length), (6, length), (0, 0), (0, 0), (2, 6)
    ]  # fmt: skip
    assert {row["tenant"] for row in found} == {"ann"}
    text = json.dumps(found)
    assert "key-ann" not in text and "hello" not in text


def test_who_leaves_is_written_down_with_what_was_generated(serve: Serve, tmp_path: Path) -> None:
    with serve(text="x" * 500, step_s=0.01, usage_folder=str(tmp_path)) as server:
        with httpx.stream("POST", server.url + CHAT, json=chat_body(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
        server.wait_idle()
        (row,) = records(tmp_path)
    assert row["status"] == 499
    assert 0 < row["completion_tokens"] < 500


def test_the_number_of_series_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_PAIRS", 10)
    monkeypatch.setattr(metrics, "MAX_MODELS", 5)
    found = Metrics()
    for number in range(300):
        found.count(f"t{number % 100}", f"m{number % 7}", 200, 1, 1)
        found.first_token(f"m{number}", 0.1)
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(found.render(None).decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "le"}
            series.setdefault(sample.name, set()).add(str(labels))
    # Pairs, each tenant's other models, all others; for each of two kinds of tokens.
    bounds = {"ftray_requests": 21, "ftray_tokens": 42, "ftray_time_to_first_token_seconds": 6}
    for name, rows in series.items():
        bound = next((most for start, most in bounds.items() if name.startswith(start + "_")), 1)
        assert len(rows) <= (1 if name.startswith("ftray_requests_in_flight") else bound), (name, rows)
    text = found.render(None).decode()
    assert 'tenant="t3"' in text and 'tenant="(others)"' in text and 'tenant="t50"' not in text
    assert 'model="m3"' in text and 'model="m50"' not in text and 'model="other"' in text


def test_tenants_that_have_gone_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_PAIRS", 4)
    tenants = {"ann", "bob"}
    found = Metrics(tenants.__contains__)
    for tenant in ("ann", "bob"):
        found.count(tenant, "m", 200, 1, 1)
        found.count(tenant, "n", 404, 0, 0)
    tenants.remove("ann")
    tenants.add("cid")
    found.count("cid", "m", 200, 1, 1)
    text = found.render(None).decode()
    assert 'tenant="ann"' not in text
    assert text.count('tenant="bob"') and 'model="m",status="200",tenant="cid"' in text


def test_secrets_and_prompts_are_nowhere(
    serve: Serve, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    canary = "canary-7f3a"
    headers = {"authorization": "Bearer key-ann", "x-note": canary}
    with caplog.at_level("DEBUG"), serve(tenants=TENANTS, usage_folder=str(tmp_path)) as server:
        for body in (
            chat_body(model="alpha", messages=[{"role": "user", "content": canary}], user=canary),
            chat_body(model=canary),
            chat_body(**{canary: 1}),
            chat_body(stop=[canary] * 17),
            chat_body(
                model="alpha", tools=[{"type": "function", "function": {"name": "f", "description": canary}}]
            ),
        ):
            server.post(CHAT, json=body, headers=headers)
        server.post(CHAT, json=chat_body(), headers={"authorization": f"Bearer {canary}"})
        metrics_text = httpx.get(f"{server.url}/metrics", headers=headers).text
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("ftray"))
    usage = "".join(path.read_text() for path in tmp_path.iterdir())
    for place in (logged, usage, metrics_text):
        assert canary not in place and "key-ann" not in place
