"""Rounds of everything an endpoint goes through: what one round leaves behind must not add up."""

import contextlib
import functools
import gc
import hashlib
import operator
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ftray.serve import metrics, models, quota

from .conftest import CHAT, chat_body
from .local import ADMIN, Local, Versions, local_endpoint

_SETTINGS = {"deltas": ["a@prod"], "admin_token_sha256": hashlib.sha256(ADMIN.encode()).hexdigest()}
_ROUNDS = 30
_PASSING = {"urllib.parse.SplitResult", "_thread.RLock"}
"""Of the clients here, and of the limiter's minutes, which forgets them when they are over."""
_NOT_SERVING = ("*/delta/publishable.py", "*/engine/fake.py")
"""Run by who publishes, whose `safe_open` of safetensors leaks 60 bytes a tensor; and no engine at all."""
_MORE_BYTES = 400
"""What a round may leave on average in lines of ours: lists and tables that grow by leaps."""


class Rounds:
    """What happens to an endpoint, again and again.

    Args:
        local: the endpoint.
        versions: what it serves.
    """

    def __init__(self, local: Local, versions: Versions) -> None:
        self._local, self._versions = local, versions
        self._count = 0

    def go(self, number: int) -> None:
        """So many rounds: a tenant comes and goes, a version too, others are asked, left and refused."""
        for _ in range(number):
            self._count += 1
            name = f"t{self._count}"
            fields = {
                "name": name,
                "deltas": ["a"],
                "max_concurrent_requests": 4,
                "tokens_per_minute": 10_000,
            }
            key = self._local.admin("POST", "/admin/tenants", json=fields).json()["key"]
            self._local.wait(lambda key=key: self._ask(key) == 200)  # type: ignore[misc]
            self._versions.registry.promote(self._versions.publish("a"), "prod")
            wanted = self._versions.registry.show("a@prod").digest
            self._local.wait(lambda wanted=wanted: wanted in self._served())  # type: ignore[misc]
            for stream in (True, False):
                self._leave(key, stream)
                assert self._ask(key, model="a@prod", stream=stream) == 200
            assert self._ask(key, model=f"nobody{self._count}") == 404
            assert self._ask(f"wrong{self._count}") == 401
            assert self._local.admin("POST", "/admin/load", json={"model": f"nobody{self._count}"}).is_error
            assert self._local.admin("DELETE", f"/admin/tenants/{name}").status_code == 200
            self._local.wait(lambda key=key: self._ask(key) == 401)  # type: ignore[misc]
        engines = self._local.engines
        self._local.wait(
            lambda: not self._local.front.in_flight and not any(e._loop._streams for e in engines)
        )
        time.sleep(0.5)  # connections that were left are closed

    def _served(self) -> set[str]:
        return {model.digest for model in self._local.front.view.models}

    def _ask(self, key: str, **fields: Any) -> int:
        headers = {"authorization": f"Bearer {key}"}
        body = chat_body(max_tokens=5, **fields)
        return httpx.post(self._local.url + CHAT, json=body, headers=headers, timeout=10).status_code

    def _leave(self, key: str, stream: bool) -> None:
        headers = {"authorization": f"Bearer {key}"}
        settings: Any = {"json": chat_body(model="a@prod", stream=stream), "headers": headers}
        with contextlib.suppress(httpx.ReadTimeout):
            timeout = httpx.Timeout(10, read=10 if stream else 0.05)
            with httpx.stream("POST", self._local.url + CHAT, timeout=timeout, **settings) as response:
                next(response.iter_raw())


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    objects: Counter[str]
    """By type."""
    memory: tracemalloc.Snapshot
    """By line of ours."""
    num_fds: int
    num_threads: int


def held() -> Held:
    """The least of several looks, between which whatever is under way ends."""
    looks = []
    for _ in range(5):
        time.sleep(0.2)
        gc.collect()
        looks.append(
            Counter(f"{type(found).__module__}.{type(found).__qualname__}" for found in gc.get_objects())
        )
    filters = [tracemalloc.Filter(True, "*/ftray/*"), *(tracemalloc.Filter(False, it) for it in _NOT_SERVING)]
    memory = tracemalloc.take_snapshot().filter_traces(filters)
    process = psutil.Process()
    return Held(functools.reduce(operator.and_, looks), memory, process.num_fds(), threading.active_count())


@pytest.mark.slow
def test_rounds_leave_nothing_behind(
    tiny_adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MAX_PAIRS", 6)
    monkeypatch.setattr(models, "_MAX_CHECKED", 3)
    monkeypatch.setattr(quota, "LEASE_S", 0.1)
    versions = Versions(tiny_adapters["a"], tmp_path)
    versions.registry.promote(versions.publish("a"), "prod")
    settings = _SETTINGS | {"tenants_file": str(tmp_path / "tenants.json")}
    tracemalloc.start()
    with local_endpoint(versions, settings, text="x" * 400, step_s=0.002) as local:
        rounds = Rounds(local, versions)
        rounds.go(5)
        before = held()
        rounds.go(_ROUNDS)
        after = held()
    tracemalloc.stop()
    objects = after.objects - before.objects
    assert not {name: count for name, count in objects.items() if count >= _ROUNDS and name not in _PASSING}
    lines = after.memory.compare_to(before.memory, "lineno")
    assert not [line for line in lines if line.size_diff > _MORE_BYTES * _ROUNDS]
    assert after.num_fds <= before.num_fds + 5
    assert after.num_threads <= before.num_threads + 2
