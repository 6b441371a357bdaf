"""Our words for what is asked and answered, in vLLM's."""

from dataclasses import dataclass
from typing import Any

from ftray.engine.api import Source
from ftray.engine.request import Request, Sampling, TokenLogprob


@dataclass(eq=False)
class VLLMDelta:
    """A delta and vLLM's name for it, which is never used twice."""

    source: Source
    digest: str = ""
    lora: Any = None
    in_flight: int = 0


def prompt_logprobs(request: Request, entries: Any, num_top: int) -> list[TokenLogprob | None]:
    """Log-probabilities of a prompt from vLLM's entries, one for each token."""
    start = max(1, request.sampling.prompt_logprobs_start)
    tokens = list(zip(request.prompt_ids, entries, strict=True))[start:]
    return [None] * start + [token_logprob(token, entry, num_top) for token, entry in tokens]


def token_logprob(token: int, entry: Any, num_top: int) -> TokenLogprob:
    """Log-probability of one token from vLLM's entry for its place."""
    ranked = sorted(entry.items(), key=lambda item: -item[1].logprob)[:num_top]
    return TokenLogprob(token, entry[token].logprob, tuple((other, one.logprob) for other, one in ranked))


def sampling_params(sampling: Sampling, vocab_size: int) -> Any:
    """vLLM's `SamplingParams` for a model with so many token ids; stop tokens beyond them can never come."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    names = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "ignore_eos", "logprobs", "min_tokens")
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_logprobs")
    return SamplingParams(
        **{name: getattr(sampling, name) for name in (*names, *penalties)},
        # It takes no 0: one token is computed and left out.
        max_tokens=max(1, sampling.max_tokens),
        stop=list(sampling.stop),
        stop_token_ids=[token for token in sampling.stop_token_ids if token < vocab_size],
        output_kind=RequestOutputKind.DELTA,
    )
