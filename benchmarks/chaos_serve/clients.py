"""Clients of a disturbed endpoint: they ask all the while and check every answer against the version it names."""

import contextlib
import json
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.chaos_serve.judge import Judge
from benchmarks.chaos_serve.versions import BASE, QUESTIONS, SHORT, messages

HANG_S = 40.0
"""An answer that takes longer counts as hanging."""
CHAT = "/v1/chat/completions"
MODELS: Mapping[str, tuple[str, ...]] = {
    "ann": (BASE, "a@prod"),
    "bob": (BASE, "b", "d"),
    "eve": (BASE, "c", "e", "f"),
}
"""What each tenant may ask for; of two of them nobody else may ask."""


@dataclass(frozen=True)
class Asked:
    """One request."""

    tenant: str
    model: str
    question: int
    num_tokens: int = SHORT
    stream: bool = False

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "model": self.model,
            "messages": messages(self.question),
            "max_tokens": self.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self.stream,
        }


def text_of(events: list[str]) -> str:
    """The answer in a stream's events."""
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


class Clients:
    """Several clients, each with a thread; between them they ask for everything there is.

    Args:
        url: the endpoint, without `/v1`.
        keys: of the tenants; may change.
        judge: sees every answer.
        number: of clients.
    """

    def __init__(self, url: str, keys: Mapping[str, str], judge: Judge, number: int) -> None:
        self._url, self._keys, self._judge, self._number = url, keys, judge, number
        self._stop = threading.Event()
        self._turn = 0

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """They ask for the length of a block, and have their last answers when it ends."""
        self._stop.clear()
        self._turn += 1
        seeds = [1000 * self._turn + at for at in range(self._number)]
        threads = [threading.Thread(target=self._client, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            self._judge.quiet()

    def _client(self, seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=HANG_S) as client:
            while not self._stop.is_set():
                tenant = draw.choice(list(MODELS))
                model, question = draw.choice(MODELS[tenant]), draw.randrange(len(QUESTIONS))
                asked = Asked(tenant, model, question, stream=draw.random() < 0.5)
                self._judge.count("requests")
                try:
                    if draw.random() < 0.03:
                        self._foreign(client, tenant, draw)
                    elif asked.stream:
                        self._streamed(client, asked, leave=draw.random() < 0.2)
                    else:
                        self._whole(client, asked)
                except httpx.TimeoutException:
                    self._judge.count("hangs")
                except httpx.HTTPError as error:
                    self._judge.count("failed", f"{asked}: {type(error).__name__}: {error}")

    def _headers(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self._keys[tenant]}"}

    def _foreign(self, client: httpx.Client, tenant: str, draw: random.Random) -> None:
        others = [model for name, models in MODELS.items() if name != tenant for model in models[1:]]
        body = Asked(tenant, draw.choice(others), 0).body()
        response = client.post(CHAT, json=body, headers=self._headers(tenant))
        self._judge.count("foreign_refused" if response.status_code == 404 else "foreign_answered")

    def _whole(self, client: httpx.Client, asked: Asked) -> None:
        response = client.post(CHAT, json=asked.body(), headers=self._headers(asked.tenant))
        if response.status_code != 200:
            self._judge.count("failed", f"{asked}: {response.status_code} {response.text[:120]}")
            return
        text = response.json()["choices"][0]["message"]["content"]
        digest = response.headers["x-ftray-digest"]
        self._judge.answer(asked.model, asked.question, asked.num_tokens, digest, text)

    def _streamed(self, client: httpx.Client, asked: Asked, *, leave: bool) -> None:
        with client.stream("POST", CHAT, json=asked.body(), headers=self._headers(asked.tenant)) as response:
            if response.status_code != 200:
                response.read()
                self._judge.count("failed", f"{asked}: {response.status_code} {response.text[:120]}")
                return
            parts = []
            for part in response.iter_text():
                parts.append(part)
                if leave and len(parts) > 3:
                    self._judge.count("left_early")
                    return
        judge_stream(self._judge, asked, response.headers["x-ftray-digest"], "".join(parts))


def judge_stream(judge: Judge, asked: Asked, digest: str, stream: str) -> None:
    """Whether a stream ended as it may: whole, or with an error and without `[DONE]`."""
    lines = stream.split("\n")  # other ends of lines may stand in an answer
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    if "event: error" in lines:
        judge.count("streams_ended_with_error")
        if "[DONE]" in events:
            judge.count("false_ends", "an error and its end")
    elif events[-1:] != ["[DONE]"]:
        judge.count("failed", f"{asked}: a stream without its end")
    elif '"finish_reason":"length"' not in "".join(events[-3:]):
        judge.count("false_ends", f"{asked}: an end without its reason")
    else:
        judge.answer(asked.model, asked.question, asked.num_tokens, digest, text_of(events))
