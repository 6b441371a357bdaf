"""What an engine is: requests in, increments of text out, many deltas over one base at once.

An engine is plain, synchronous and single-threaded. Whoever owns it calls `step` while `has_work`; a thread
that does so for a service is `ftray.serve.loop`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ftray.engine.request import FinishReason, Output, Request, Sampling, ScoreItem, TokenLogprob

__all__ = [
    "DeltaInfo",
    "Engine",
    "EngineConfig",
    "EngineInfo",
    "EngineStats",
    "FinishReason",
    "Output",
    "Request",
    "Sampling",
    "ScoreItem",
    "Source",
    "TokenLogprob",
]

Source = str | Callable[[], str]
"""A delta's folder, or a function that brings it there (from a registry, say), run on another thread."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Facts about an engine and the base it holds."""

    engine: str
    """Which engine answers: `torch`, `hf_generate`, `vllm`, `fake`; a fallback says so here."""
    base: str
    """Name of the base model."""
    base_digest: str
    """Identity of the base's weights and configuration."""
    chat_template_hash: str
    """Hash of the tokenizer's chat template."""
    max_length: int
    """Most tokens of prompt and answer together."""
    max_slots: int = 0
    """Most deltas that can be in use at once; 0: no limit."""


@dataclass(frozen=True, kw_only=True)
class DeltaInfo:
    """A delta that answers to a name."""

    name: str
    digest: str
    """Digest of what answers; empty until its files were first read."""
    kind: str
    """`low_rank`, ...; empty until its files were first read."""
    mixed_batch: bool
    """False: rows under it run in steps of their own."""
    tier: Literal["slot", "host", "disk", "failed"]
    """Where its tensors are; `failed`: the last load failed, the next request tries again."""
    size_bytes: int
    """Of its tensors; 0 until they were first read."""
    in_flight: int
    """Answers under it that wait or run."""
    error: str | None = None
    """Why the last load failed."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot of the load, and counts since the start."""

    running: int
    """Answers that hold a row."""
    waiting: int
    """Answers admitted by nobody yet."""
    blocks_used: int
    """KV blocks that belong to an answer."""
    blocks_total: int
    blocks_cached: int = 0
    """KV blocks that nobody holds and that keep a prefix; given up when blocks run short."""
    slots_used: int = 0
    """Deltas in place."""
    slots_total: int = 0
    """Deltas that fit in place; 0: no limit."""
    loading: int = 0
    """Deltas being read."""
    prompt_tokens: int = 0
    """Prompt tokens computed."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache instead."""
    generated_tokens: int = 0
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    preemptions: int = 0
    """Times an answer gave its blocks up to others."""
    delta_loads: int = 0
    """Times a delta was put in place."""
    delta_reads: int = 0
    """Times one was read beside the steps."""
    step_s: float = 0.0
    """Seconds that a step with one token of each row has taken lately; 0 if that is not measured."""
    tenant_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens computed for each tenant with work, prompts and answers together."""


class Engine(Protocol):
    """Generates for many requests, each under the base or one of the deltas."""

    @property
    def info(self) -> EngineInfo:
        """Facts about this engine."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: for an unknown delta, an empty prompt, or more tokens than can ever fit.
        """
        ...

    def step(self) -> list[Output]:
        """Run one forward pass over what is due and return what each answer gained."""
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request, all its answers, and free what it holds at once; unknown ids are ignored."""
        ...

    def has_work(self) -> bool:
        """True while a request waits or runs."""
        ...

    def load_delta(self, name: str, folder: str, *, replace: bool = False) -> None:
        """Read and check the delta in a folder now and make it answer to a name.

        Args:
            name: what requests call it.
            folder: its files; they must stay as they are while the name is known.
            replace: switch a known name: requests added from now on are answered by the new delta, those in
                flight end on the old one.

        Raises:
            DeltaError: one line, if it is damaged or belongs to another base or chat template; a known name
                keeps its delta.
        """
        ...

    def register_delta(self, name: str, source: Source) -> None:
        """Make a name known without reading anything; the first request under it loads it beside the steps.

        A request whose delta cannot be loaded ends with an error of status 4xx.

        Raises:
            DeltaError: if the name is known already.
        """
        ...

    def unload_delta(self, name: str) -> None:
        """Forget a delta; a request in flight under it makes this a `DeltaError`."""
        ...

    def deltas(self) -> list[str]:
        """Names of the known deltas."""
        ...

    def delta_info(self, name: str) -> DeltaInfo:
        """Facts about a known delta. Raises `DeltaError`."""
        ...

    def stats(self) -> EngineStats:
        """The load now."""
        ...

    def generate(self, requests: Iterable[Request]) -> list[Output]:
        """Run requests to their end; one complete `Output` for each answer, in the order given."""
        ...

    def score(self, items: Iterable[ScoreItem]) -> list[float]:
        """Sum of the log-probabilities of each completion's tokens after its prompt (natural logarithm)."""
        ...


class EngineConfig(Protocol):
    """Settings of an engine, from the catalog kind `engine`."""

    @property
    def max_num_seqs(self) -> int:
        """Answers that run at once."""
        ...

    def build(self, base: str) -> Engine:
        """Load a base model folder and return an engine over it."""
        ...

    def load_tokenizer(self, base: str) -> Any:
        """The base's tokenizer alone, for whoever renders prompts without holding the model."""
        ...
