"""A real endpoint on Ray, to be disturbed."""

import contextlib
import datetime
import hashlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.chaos_serve.clients import CHAT, HANG_S, MODELS, Asked
from benchmarks.chaos_serve.judge import Judge
from benchmarks.chaos_serve.versions import DELTAS, Versions
from ftray.cluster.ray_session import session
from ftray.config.serve import ServeConfig
from ftray.core.spec import parse
from ftray.serve.tenant_store import TenantStore

_TOKEN = "chaos"
_WITHIN_S = 60.0
_GRACE_S = 20.0
NUM_ENGINES = 2
PLACES = 16
"""Answers that run in an engine, and as many again that wait."""


class Endpoint:
    """Two engine replicas over a tiny model, three tenants, six deltas over two places.

    Args:
        versions: what it serves.
        folder: where its tenants are.
        judge: sees what becomes of it.
        seed: decides whom a kill hits.
    """

    def __init__(self, versions: Versions, folder: Path, judge: Judge, seed: int) -> None:
        self.versions = versions
        self.judge = judge
        self.keys: dict[str, str] = {}
        self.url = ""
        self._draw = random.Random(seed)
        self._tenants = TenantStore(folder / "tenants.json")
        self._admin_port = _free_port()  # the same after the control was killed

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Serve for the length of a block."""
        from ftray.serve.ray_app import run

        for name in DELTAS:
            ref = self.versions.publish(name)
            if name == "a":
                self.versions.registry.promote(ref, "prod")
        for tenant, models in MODELS.items():
            deltas = [model.partition("@")[0] for model in models[1:]]
            self.keys[tenant] = self._tenants.add(tenant, deltas=deltas)
        with session(address="local", num_cpus=2):
            handle = run(parse(ServeConfig, self._config()))
            self.url = handle.url
            try:
                yield
            finally:
                handle.stop()

    def _config(self) -> dict[str, Any]:
        few = {"kv_cache_tokens": 4096, "max_num_seqs": PLACES, "max_loras": 2, "max_cpu_loras": 1}
        return {
            "base": str(self.versions.base),
            "registry": str(self.versions.registry.root),
            "deltas": ["a@prod", *DELTAS[1:]],
            "tenants_file": str(self._tenants.path),
            "metrics_key_sha256": _sha256(_TOKEN),
            "port": 0,
            "num_replicas": NUM_ENGINES,
            "num_cpus": 0.5,
            "follow_s": 0.5,
            "max_queued_requests": PLACES,
            "request_timeout_s": HANG_S - 10,
            "engine": {"type": "torch", **few},
            "admin_port": self._admin_port,
            "admin_token_sha256": _sha256(_TOKEN),
        }

    def status(self) -> dict[str, Any]:
        """What the admin API says."""
        url = f"http://127.0.0.1:{self._admin_port}/admin/status"
        found: dict[str, Any] = httpx.get(url, headers=_bearer(_TOKEN), timeout=10).json()
        return found

    def num_series(self) -> int:
        """Series in the metrics."""
        text = httpx.get(f"{self.url}/metrics", headers=_bearer(_TOKEN), timeout=10).text
        return sum(not line.startswith("#") for line in text.splitlines())

    def kill(self, deployment: str) -> None:
        """Kill a replica and wait until another has everything that is served, and answers."""
        before = {row["name"] for row in self.status()["engines"]}
        there = {process.pid for process in processes(deployment)}
        self._draw.choice(processes(deployment)).kill()
        began = time.monotonic()

        def recovered() -> bool:
            found = self.status()
            whole = [row["name"] for row in found["engines"] if row["loaded"] >= len(DELTAS)]
            new = deployment != "engine" or set(whole) - before
            well = httpx.get(f"{self.url}/healthz", timeout=10).status_code == 200
            return bool(
                new and well and len(whole) >= NUM_ENGINES and len(processes(deployment)) >= len(there)
            )

        self.wait(recovered)
        spent = time.monotonic() - began
        waited = [_waited_s(process.pid) for process in processes(deployment) if process.pid not in there]
        self.judge.most("slowest_recovery_s", spent)
        self.judge.most("slowest_recovery_alone_s", spent - max(waited, default=0.0))

    def publish(self) -> None:
        """Promote a new version and wait until it answers."""
        self.versions.registry.promote(self.versions.publish("a"), "prod")
        self._wait_switched()

    def publish_bad(self) -> None:
        """Point the alias at a version that must not answer, for a while."""
        kind = self._draw.choice(["overflow", "foreign", "damaged"])
        self.versions.registry.alias("a", "prod", self.versions.publish_bad("a", kind))
        time.sleep(2.0)  # answers are checked all the while
        self.versions.registry.rollback("a", "prod")
        self._wait_switched()

    def rollback(self) -> None:
        """Go back to the version before, if there is one."""
        if len(self.versions.registry.state("a").aliases["prod"]) > 1:
            self.versions.registry.rollback("a", "prod")
            self._wait_switched()

    def upload_hostile(self) -> None:
        """Upload what must be refused."""
        for kind, refused in self.versions.upload_hostile("b").items():
            self.judge.count("hostile_refused" if refused else "hostile_taken", "" if refused else kind)

    def rotate(self) -> None:
        """Give a tenant a new key; the one before ends some time later."""
        tenant = self._draw.choice(list(MODELS))
        key = self._tenants.rotate(tenant, grace=datetime.timedelta(seconds=_GRACE_S))
        self.wait(lambda: self.ask(Asked(tenant, "base", 0, 1), key).status_code == 200)
        self.keys[tenant] = key
        self.judge.count("keys_rotated")

    def ask(self, asked: Asked, key: str | None = None) -> httpx.Response:
        """One answer."""
        headers = _bearer(key or self.keys[asked.tenant])
        return httpx.post(f"{self.url}{CHAT}", json=asked.body(), headers=headers, timeout=HANG_S)

    def wait_free(self) -> None:
        """Nobody asks any more: wait until nothing is held."""
        began = time.monotonic()

        def free() -> bool:
            status = self.status()
            held = sum(row["blocks_used"] + row["running"] + row["waiting"] for row in status["engines"])
            return bool(status["engines"]) and not held + sum(row["in_flight"] for row in status["fronts"])

        try:
            self.wait(free, 10.0)
        except TimeoutError:
            self.judge.count("not_released", str(self.status()["engines"]))
        self.judge.most("slowest_release_s", time.monotonic() - began)

    def _wait_switched(self) -> None:
        wanted = self.versions.registry.show("a@prod").digest
        began = time.monotonic()
        asked = Asked("ann", "a@prod", 0, 1)
        self.wait(lambda: self.ask(asked).headers.get("x-ftray-digest") == wanted)
        self.judge.most("slowest_switch_s", time.monotonic() - began)

    def wait(self, condition: Callable[[], bool], within_s: float = _WITHIN_S) -> None:
        """Wait until something is so; `TimeoutError` if it does not come to it."""
        until = time.monotonic() + within_s
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if condition():
                    return
            if time.monotonic() > until:
                raise TimeoutError("the endpoint did not come to what was asked of it in time")
            time.sleep(0.1)


def processes(deployment: str) -> list[psutil.Process]:
    """The replicas of a deployment."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if f"ServeReplica:ftray:{deployment}" in _command(process)]


def _waited_s(pid: int) -> float:
    """How long a process's main thread was ready to run while others had the processors (Linux).

    Of one thread, since the waiting of several at once is no longer than that of one.
    """
    try:
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _command(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline())
    except psutil.Error:
        return ""


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
