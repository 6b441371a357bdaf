"""What an engine is: requests in, increments of text out, many deltas over one base at once.

An engine is plain, synchronous and single-threaded. Whoever owns it calls `step` while `has_work`; a thread
that does so for a service is `ftray.serve.loop`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ftray.core.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to end. Field names are OpenAI's."""

    max_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 takes the most likely token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this."""
    seed: int | None = None
    """The same seed gives the same draws, whatever else is in the batch; None: a fresh one."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token, for measurements."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "use at least 1")
        _require(0.0 <= self.temperature <= 2.0, "temperature", self.temperature, "use 0 to 2")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "use more than 0 and at most 1")
        _require(len(self.stop) <= 16 and all(self.stop), "stop", self.stop, "use up to 16, none empty")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue."""

    id: str
    """Unique among the requests an engine holds."""
    prompt_ids: Sequence[int]
    """The prompt's tokens."""
    delta: str | None = None
    """Name of a loaded delta; None: the base."""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step (or, from `generate`, a whole request) added to a request."""

    id: str
    text: str
    """New text: whole characters only, never a part of a stop string that was met."""
    token_ids: list[int]
    """New tokens. `text` may lag behind them while a character or a possible stop string is open."""
    finish_reason: FinishReason | None = None
    """None while the request goes on."""
    error: str | None = None
    """One line, with `finish_reason` `error`."""


@dataclass(frozen=True, kw_only=True)
class ScoreItem:
    """A completion whose log-probability after a prompt is asked for."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    delta: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Facts about an engine and the base it holds."""

    engine: str
    """Which engine answers: `torch`, `hf_generate`, `fake`; a fallback says so here."""
    base: str
    """Name of the base model."""
    base_digest: str
    """Identity of the base's weights and configuration."""
    chat_template_hash: str
    """Hash of the tokenizer's chat template."""
    max_length: int
    """Most tokens of prompt and answer together."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot of the load."""

    running: int
    """Requests that hold a row."""
    waiting: int
    """Requests admitted by nobody yet."""
    blocks_used: int
    """KV blocks that belong to a request."""
    blocks_total: int


class Engine(Protocol):
    """Generates for many requests, each under the base or one of the loaded deltas."""

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
        """Run one forward pass over what is due and return what each request gained."""
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request and free what it holds; unknown ids are ignored."""
        ...

    def has_work(self) -> bool:
        """True while a request waits or runs."""
        ...

    def load_delta(self, name: str, folder: str) -> None:
        """Make the delta in a folder answer to a name.

        Raises:
            DeltaError: one line, if it is damaged or belongs to another base or chat template.
        """
        ...

    def unload_delta(self, name: str) -> None:
        """Forget a delta; a request in flight under it makes this a `DeltaError`."""
        ...

    def deltas(self) -> list[str]:
        """Names of the loaded deltas."""
        ...

    def stats(self) -> EngineStats:
        """The load now."""
        ...

    def generate(self, requests: Iterable[Request]) -> list[Output]:
        """Run requests to their end; one complete `Output` each, in the order given."""
        ...

    def score(self, items: Iterable[ScoreItem]) -> list[float]:
        """Sum of the log-probabilities of each completion's tokens after its prompt (natural logarithm)."""
        ...


class EngineConfig(Protocol):
    """Settings of an engine, from the catalog kind `engine`."""

    @property
    def max_num_seqs(self) -> int:
        """Requests that run at once."""
        ...

    def build(self, base: str) -> Engine:
        """Load a base model folder and return an engine over it."""
        ...

    def load_tokenizer(self, base: str) -> Any:
        """The base's tokenizer alone, for whoever renders prompts without holding the model."""
        ...


def _require(condition: bool, param: str, value: object, remedy: str) -> None:
    if not condition:
        raise RequestError(f"{param}: {value!r} is refused; {remedy}", param=param)
