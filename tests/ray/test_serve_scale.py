"""The number of engines follows the load, and nobody is refused or answered wrongly while it does."""

import concurrent.futures
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from ftray.config.serve import ServeConfig
from ftray.core.spec import parse
from ftray.testing import tiny
from tests.ray.endpoint import ASK, publish

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def test_engines_come_and_go_with_the_load(ray_cluster: None, tmp_path: Path) -> None:
    from ftray.serve.ray_app import run

    base = tiny.tiny_base(tmp_path / "base", max_position_embeddings=2048)
    registry = publish(base, {"a": tiny.random_adapter(base, tmp_path / "a")}, tmp_path / "registry")
    delays = {"upscale_delay_s": 1, "downscale_delay_s": 5}
    settings: dict[str, Any] = {
        "base": str(base),
        "registry": str(registry.root),
        "deltas": ["a"],
        "port": 0,
        "num_cpus": 0.5,
        "autoscale": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, **delays},
        "admin_port": 0,
        "admin_token_sha256": "8c6976e5b5410415bde908bd4dee15dfb167a9c873fc4bb8a81f6f2ab448a918",  # of "admin"
    }
    handle = run(parse(ServeConfig, settings))
    try:

        def num_engines() -> int:
            url = f"http://127.0.0.1:{handle.admin_port}/admin/status"
            rows = httpx.get(url, headers={"authorization": "Bearer admin"}, timeout=30).json()["engines"]
            return sum(row["loaded"] == 1 for row in rows)

        def ask(number: int) -> str:
            body = {"model": "a", "messages": ASK, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
            response = httpx.post(f"{handle.url}/v1/chat/completions", json=body, timeout=120)
            assert response.status_code == 200, response.text
            text: str = response.json()["choices"][0]["message"]["content"]
            return text

        assert num_engines() == 1
        texts, until = {ask(0)}, time.monotonic() + 120
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            while num_engines() < 2:
                texts.update(pool.map(ask, range(24)))
                assert time.monotonic() < until
        until = time.monotonic() + 120
        while num_engines() > 1:
            texts.add(ask(0))
            assert time.monotonic() < until
        assert len(texts) == 1
    finally:
        handle.stop()
