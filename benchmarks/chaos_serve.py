"""`python -m benchmarks.chaos --serve`: an endpoint whose replicas are killed and whose deltas change under load.

A real endpoint on Ray (two engine replicas over a tiny model) is asked all the while by clients that check every
answer against the version whose digest it names; some of them leave early. Meanwhile engine replicas and the
control are killed, good versions are promoted and rolled back, and bad ones are published. At the end nothing
may be held any more.
"""

import hashlib
import os
import platform
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from benchmarks.chaos_clients import ASK, NUM_TOKENS, Clients, ask
from ftray.cluster.ray_session import session
from ftray.config.serve import ServeConfig
from ftray.core.spec import parse
from ftray.delta import manifest
from ftray.engine.api import Request, Sampling
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer
from ftray.registry.registry import Registry
from ftray.testing import tiny

_CLIENTS = 6
_TOKEN = "chaos"
EVENTS = ("kill_engine", "publish", "publish_bad", "rollback", "kill_control", "publish")


class Campaign:
    """One endpoint and what is done to it.

    Args:
        folder: where everything lies.
        seed: decides events and moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.folder = folder
        self.base = tiny.tiny_base(folder / "base", max_position_embeddings=1024)
        self.identity = base_identity(self.base)
        self.template = chat_template_hash(load_tokenizer(self.base))
        self.registry = Registry(folder / "registry")
        self.engine = TorchEngineConfig(kv_cache_tokens=2048).build(str(self.base))
        self.texts: dict[str, str] = {self.identity["digest"]: self._text(None)}
        self.bad: set[str] = set()
        self._made = 0
        self.url = self.admin = ""
        self.clients = Clients("", self.texts, self.bad, 0)

    def version(self, *, bad: str = "") -> str:
        """Publish a new version of `a`; returns its reference."""
        self._made += 1
        folder = tiny.random_adapter(self.base, self.folder / f"delta-{self._made}", r=4, seed=self._made)
        if bad == "overflow":
            _poison(folder / "adapter_model.safetensors")
        identity = self.identity if bad != "foreign" else self.identity | {"digest": "xxh3:" + "1" * 32}
        manifest.write(folder, kind="low_rank", base=identity, chat_template_hash=self.template)
        entry = self.registry.publish(folder, "a")
        if bad:
            self.bad.add(entry.digest)
        else:
            self.texts[entry.digest] = self._text(str(entry.path))
        if bad == "damaged":
            weights = entry.path / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-16])
        return entry.ref

    def run(self, minutes: float, quiet: bool) -> None:
        """Disturb an endpoint for some minutes."""
        from ftray.serve.ray_app import run

        self.registry.promote(self.version(), "prod")
        config = {
            "base": str(self.base),
            "registry": str(self.registry.root),
            "deltas": ["a@prod"],
            "port": 0,
            "num_replicas": 2,
            "num_cpus": 0.5,
            "follow_s": 0.5,
            "engine": {"type": "torch", "kv_cache_tokens": 4096},
            "admin_port": _free_port(),  # the same after the control was killed
            "admin_token_sha256": hashlib.sha256(_TOKEN.encode()).hexdigest(),
        }
        with session(address="local", num_cpus=2):
            handle = run(parse(ServeConfig, config))
            self.url = handle.url
            self.admin = f"http://127.0.0.1:{handle.admin_port}/admin/status"
            self.clients = Clients(self.url, self.texts, self.bad, _CLIENTS)
            self.clients.start()
            until = time.monotonic() + minutes * 60
            try:
                for event in _cycle(EVENTS, self.draw):
                    if time.monotonic() > until:
                        break
                    self._disturb(event, quiet)
            finally:
                self.clients.stop()
            self._check_free()
            handle.stop()

    def _disturb(self, event: str, quiet: bool) -> None:
        started = time.monotonic()
        if event.startswith("kill_"):
            self._kill(event.removeprefix("kill_"))
        elif event == "publish":
            ref = self.version()
            self.registry.promote(ref, "prod")
            self._wait_switched()
        elif event == "rollback":
            if len(self.registry.state("a").aliases["prod"]) < 2:
                return
            self.registry.rollback("a", "prod")
            self._wait_switched()
        else:
            kind = self.draw.choice(["overflow", "foreign", "damaged"])
            version = int(self.version(bad=kind).partition("@")[2])
            self.registry.alias("a", "prod", version)
            time.sleep(2.0)  # answers are checked all the while
            self.registry.rollback("a", "prod")
            self._wait_switched()
        self.clients.counts.events[event] += 1
        if not quiet:
            print(
                f"{event}: {time.monotonic() - started:.1f} s; {self.clients.counts.answered} answered",
                flush=True,
            )
        time.sleep(self.draw.uniform(0.2, 1.5))

    def _kill(self, deployment: str) -> None:
        self.draw.choice(_processes(deployment)).kill()
        number = 2 if deployment == "engine" else 1
        began = time.monotonic()
        self._wait(lambda: len(_processes(deployment)) >= number and self._well(), 60.0)
        spent = time.monotonic() - began
        self.clients.counts.slowest_recovery_s = max(self.clients.counts.slowest_recovery_s, spent)

    def _well(self) -> bool:
        return httpx.get(f"{self.url}/healthz", timeout=10).status_code == 200

    def _wait_switched(self) -> None:
        wanted = self.registry.show("a@prod").digest
        began = time.monotonic()

        def switched() -> bool:
            response = ask(httpx, self.url, {"model": "a@prod", "max_tokens": 1, "temperature": 0})
            return response.headers.get("x-ftray-digest") == wanted

        self._wait(switched, 60.0)
        self.clients.counts.slowest_switch_s = max(
            self.clients.counts.slowest_switch_s, time.monotonic() - began
        )

    def _wait(self, condition: Callable[[], bool], within_s: float) -> None:
        until = time.monotonic() + within_s
        while True:
            try:
                if condition():
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > until:
                raise TimeoutError("the endpoint did not come to what was asked of it in time")
            time.sleep(0.05)

    def _check_free(self) -> None:
        def free() -> bool:
            status = httpx.get(self.admin, headers={"authorization": f"Bearer {_TOKEN}"}, timeout=10).json()
            load = sum(row["blocks_used"] + row["running"] + row["waiting"] for row in status["engines"])
            return bool(status["engines"]) and not load

        self._wait(free, 10.0)

    def _text(self, folder: str | None) -> str:
        """What a version says when it is asked alone."""
        if folder is not None:
            self.engine.load_delta(folder, folder)
        ids = self.engine.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
        request = Request(id="x", prompt_ids=ids, delta=folder, sampling=Sampling(max_tokens=NUM_TOKENS))
        text = self.engine.generate([request])[0].text
        if folder is not None:
            self.engine.unload_delta(folder)
        return text


def campaign(folder: Path, minutes: float, seed: int, quiet: bool) -> dict[str, Any]:
    """Disturb an endpoint for some minutes; returns the counts that are printed last."""
    run = Campaign(folder / f"serve-{seed}", seed)
    error = None
    try:
        run.run(minutes, quiet)
    except (TimeoutError, AssertionError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    counts = run.clients.counts
    wrong = (
        counts.failed + counts.false_ends + counts.wrong_answers + counts.hangs + counts.bad_versions_served
    )
    return {
        "benchmark": "chaos-serve",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "minutes": minutes,
        "seed": seed,
        **{name: value for name, value in vars(counts).items() if name != "events"},
        "events": dict(counts.events),
        "promises_broken": wrong,
        "error": error,
    }


def _cycle(events: tuple[str, ...], draw: random.Random) -> Any:
    """Every event in turn, each round in an order of its own."""
    while True:
        yield from draw.sample(events, len(events))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _processes(deployment: str) -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if f"ServeReplica:ftray:{deployment}" in _command(process)]


def _command(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline())
    except psutil.Error:
        return ""


def _poison(weights: Path) -> None:
    from safetensors.torch import load_file, save_file

    # Finite, as the registry asks, but their product is not.
    tensors = load_file(weights)
    save_file({name: torch.full_like(tensor, 1e30) for name, tensor in tensors.items()}, weights)
