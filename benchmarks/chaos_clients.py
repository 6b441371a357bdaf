"""Clients of a disturbed endpoint: they ask all the while and check every answer against the version it names."""

import collections
import json
import random
import threading
from dataclasses import dataclass, field
from typing import Any

import httpx

ASK = [{"role": "user", "content": "What is this?"}]
NUM_TOKENS = 24
HANG_S = 40.0
"""An answer that takes longer counts as hanging."""


@dataclass
class Counts:
    """What the clients and the disturber saw."""

    requests: int = 0
    answered: int = 0
    left_early: int = 0
    streams_ended_with_error: int = 0
    """Streams that had begun on a replica that was killed, and said so."""
    failed: int = 0
    """Requests that were refused or broken without having begun."""
    false_ends: int = 0
    """Streams with `[DONE]` whose text is not whole."""
    wrong_answers: int = 0
    """Texts that are not those of the version whose digest was named."""
    hangs: int = 0
    events: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest_switch_s: float = 0.0
    slowest_recovery_s: float = 0.0
    bad_versions_served: int = 0
    notes: list[str] = field(default_factory=list)


class Clients:
    """Several clients, each with a thread.

    Args:
        url: the endpoint, without `/v1`.
        texts: what each version says, by its digest; may grow.
        bad: digests that must not answer; may grow.
    """

    def __init__(self, url: str, texts: dict[str, str], bad: set[str], number: int) -> None:
        self.counts = Counts()
        self._url = url
        self._texts, self._bad = texts, bad
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(at,)) for at in range(number)]

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask no more, and wait for the answers that are due."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(timeout=HANG_S) as client:
            while not self._stop.is_set():
                model = "base" if draw.random() < 0.3 else "a@prod"
                body = {"model": model, "max_tokens": NUM_TOKENS, "temperature": 0}
                try:
                    if draw.random() < 0.5:
                        self._streamed(client, body, leave=draw.random() < 0.2)
                    else:
                        self._whole(client, body)
                except httpx.TimeoutException:
                    self._count("hangs")
                except httpx.HTTPError as error:
                    self._count("failed", f"{type(error).__name__}")

    def _whole(self, client: httpx.Client, body: dict[str, Any]) -> None:
        self._count("requests")
        response = ask(client, self._url, body)
        if response.status_code != 200:
            self._count("failed", f"{response.status_code} {response.text[:120]}")
            return
        text = response.json()["choices"][0]["message"]["content"]
        self._check(response.headers["x-ftray-digest"], text)

    def _streamed(self, client: httpx.Client, body: dict[str, Any], *, leave: bool) -> None:
        self._count("requests")
        body = {**body, "messages": ASK, "stream": True}
        with client.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                self._count("failed", f"{response.status_code} {response.text[:120]}")
                return
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                if leave and len(lines) > 6:
                    self._count("left_early")
                    return
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        if "event: error" in lines:
            self._count("streams_ended_with_error")
            if "[DONE]" in events:
                self._count("false_ends")
            return
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
        text = "".join(
            choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
        )
        ended = any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"])
        if events[-1:] != ["[DONE]"] or not ended:
            self._count("failed" if events[-1:] != ["[DONE]"] else "false_ends", "a stream without its end")
            return
        self._check(response.headers["x-ftray-digest"], text)

    def _check(self, digest: str, text: str) -> None:
        if digest in self._bad:
            self._count("bad_versions_served")
        elif self._texts.get(digest) != text:
            self._count("wrong_answers", f"{digest}: {text!r}")
        self._count("answered")

    def _count(self, name: str, note: str = "") -> None:
        with self._lock:
            setattr(self.counts, name, getattr(self.counts, name) + 1)
            if note and len(self.counts.notes) < 20:
                self.counts.notes.append(note)


def ask(client: Any, url: str, body: dict[str, Any]) -> httpx.Response:
    """Put the question with further fields; `client` is httpx itself or one of its clients."""
    response: httpx.Response = client.post(
        f"{url}/v1/chat/completions", json={**body, "messages": ASK}, timeout=HANG_S
    )
    return response
