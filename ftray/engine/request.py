"""What is asked of an engine, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ftray.core.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_LOGPROBS = 20
"""Most alternatives reported per token."""
MAX_N = 128
"""Most answers to one prompt."""
MIN_PENALTY = 0.01
"""Least repetition penalty: logits divided by less may leave the range of a float."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to end. Field names are OpenAI's, else vLLM's."""

    max_tokens: int = 256
    """Most tokens to generate; 0 only with `prompt_logprobs`, to score a prompt alone."""
    min_tokens: int = 0
    """Neither an end-of-sequence or stop token nor a stop string ends the answer before this many tokens."""
    temperature: float = 0.0
    """0 takes the most likely token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Draw from this many most likely tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of the tokens seen (Keskar et al., arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token the answer has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each time the answer has it."""
    seed: int | None = None
    """The same seed gives the same draws, whatever else is in the batch; None: a fresh one."""
    n: int = 1
    """Answers to the prompt, each with an `Output.index`; a seed gives each its own draws."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer as an end-of-sequence token does."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token, for measurements."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely ones; None: none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, once, with the first output; what `echo` needs."""
    prompt_logprobs_start: int = 0
    """First prompt token whose log-probability is reported; those before it are None."""

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        _require(self.max_tokens >= least, "max_tokens", self.max_tokens, "use at least 1")
        _require(
            0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "use 0 to max_tokens"
        )
        _require(0.0 <= self.temperature <= 2.0, "temperature", self.temperature, "use 0 to 2")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "use more than 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "use at least 1, or 0 for all")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "use 0 to 1")
        penalty = self.repetition_penalty
        _require(MIN_PENALTY <= penalty <= 10.0, "repetition_penalty", penalty, f"use {MIN_PENALTY} to 10")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "use -2 to 2")
        _require(1 <= self.n <= MAX_N, "n", self.n, f"use 1 to {MAX_N}")
        _require(len(self.stop) <= 16 and all(self.stop), "stop", self.stop, "use up to 16, none empty")
        _require(len(self.stop_token_ids) <= 64, "stop_token_ids", self.stop_token_ids, "use up to 64")
        for name in ("logprobs", "prompt_logprobs"):
            _require(
                0 <= (getattr(self, name) or 0) <= MAX_LOGPROBS, name, getattr(self, name), "use 0 to 20"
            )
        start = self.prompt_logprobs_start
        _require(start >= 0, "prompt_logprobs_start", start, "use at least 0")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue."""

    id: str
    """Unique among the requests an engine holds."""
    prompt_ids: Sequence[int]
    """The prompt's tokens."""
    delta: str | None = None
    """Name of a delta; None: the base."""
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = ""
    """Whose request it is: tenants share the engine fairly, and never a cached prefix."""
    weight: float = 1.0
    """The tenant's share of computed tokens relative to other tenants'; the latest request's counts."""
    priority: int = 0
    """Order within the tenant: smaller first, then as they came."""
    cache_salt: str = ""
    """Prompts share cached prefixes only with those of the same salt (and tenant and delta)."""
    group: str = ""
    """What the prompts of one client's request have in common, whose answers are given or given up together."""

    def __post_init__(self) -> None:
        _require(0.0 < self.weight < float("inf"), "weight", self.weight, "use a positive number")

    def check_ids(self, vocab_size: int) -> None:
        """Raise `RequestError` if the prompt has a token id that the model lacks; its tokenizer may have more."""
        for token in (max(self.prompt_ids, default=0), min(self.prompt_ids, default=0)):
            _require(
                0 <= token < vocab_size, "prompt", token, f"use the model's token ids, 0 to {vocab_size - 1}"
            )


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability under the model (natural logarithm, before penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens there and their log-probabilities, most likely first."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step (or, from `generate`, a whole request) added to one answer of a request."""

    id: str
    text: str
    """New text: whole characters only, never a part of a stop string that was met."""
    token_ids: list[int]
    """New tokens. `text` may lag behind them while a character or a possible stop string is open."""
    index: int = 0
    """Which of the request's `n` answers; each has a `finish_reason` of its own."""
    finish_reason: FinishReason | None = None
    """None while the answer goes on."""
    stop_reason: str | int | None = None
    """The stop string or stop token that was met, with `finish_reason` `stop`; None: end of sequence."""
    error: str | None = None
    """One line, with `finish_reason` `error`."""
    status: int = 500
    """HTTP status of the error: 500 is ours, 4xx the request's or its delta's."""
    digest: str = ""
    """Digest of what answers: the delta's, or the base's."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `token_ids`, if they were asked for."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One for each prompt token, once, with the first output; the first token has none."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""


@dataclass(frozen=True, kw_only=True)
class ScoreItem:
    """A completion whose log-probability after a prompt is asked for."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    delta: str | None = None


def _require(condition: bool, param: str, value: object, remedy: str) -> None:
    if not condition:
        raise RequestError(f"{param}: {value!r} is refused; {remedy}", param=param)
