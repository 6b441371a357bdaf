"""What turns the tokens of one answer into what its client gets."""

import math
from collections.abc import Collection
from typing import Any

from ftray.engine.request import FinishReason, Output, TokenLogprob
from ftray.engine.sampling import Draws
from ftray.engine.sequence import Row, Sequence
from ftray.engine.text import Detokeniser, StopStrings


class Answer:
    """The text and the end of one sequence.

    Args:
        seq: the sequence.
        tokenizer: the base's.
        eos: tokens that end an answer by the model's settings.
        digest: of what answers, once it is known.
    """

    def __init__(self, seq: Sequence, tokenizer: Any, eos: frozenset[int], digest: str = "") -> None:
        sampling = seq.request.sampling
        self.seq = seq
        self.digest = digest
        self._ends: Collection[int] = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else eos)
        self.draws = Draws(sampling, seq.tokens, len(seq.request.prompt_ids), seq.index, self._ends)
        self._eos = eos
        self._text = Detokeniser(tokenizer, seq.request.prompt_ids)
        self._stop = StopStrings(sampling.stop)
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        if sampling.prompt_logprobs is not None:
            silent = min(max(1, sampling.prompt_logprobs_start), len(seq.request.prompt_ids))
            self._prompt_logprobs = [None] * silent
        self._started = False

    @property
    def scores_only(self) -> bool:
        """True if nothing is to be generated."""
        return self.seq.request.sampling.max_tokens == 0

    def prompt_places(self, row: Row) -> range:
        """Places of the sequence within a row whose logits give prompt tokens' log-probabilities still wanted."""
        if self._prompt_logprobs is None:
            return range(0)
        stop = min(row.start + row.length, len(self.seq.request.prompt_ids) - 1)
        return range(max(row.start, len(self._prompt_logprobs) - 1), stop)

    def note_prompt(self, logprob: TokenLogprob) -> None:
        """Take the log-probability of the prompt's next token."""
        assert self._prompt_logprobs is not None
        self._prompt_logprobs.append(logprob)

    def take(self, token: int, logprob: TokenLogprob | None) -> Output:
        """Give the sequence its next token; what the client gains by it."""
        seq, sampling = self.seq, self.seq.request.sampling
        seq.tokens.append(token)
        ended = token in self._ends and seq.num_generated > sampling.min_tokens
        new = "" if ended else self._text.feed([token])
        text = self._stop.feed(new) if seq.num_generated > sampling.min_tokens else new
        reason: FinishReason | None = None
        if ended or self._stop.met is not None:
            reason = "stop"
        elif seq.num_generated >= sampling.max_tokens:
            reason = "length"
        if reason and self._stop.met is None:
            text += self._stop.feed(self._text.finish()) + self._stop.finish()
            reason = "stop" if self._stop.met is not None else reason
        stop: str | int | None = self._stop.met
        if stop is None and ended and token not in self._eos:
            stop = token
        return self._output(
            text,
            [token],
            finish_reason=reason,
            stop_reason=stop,
            logprobs=None if logprob is None else [logprob],
        )

    def scored(self) -> Output:
        """The end of an answer that generates nothing."""
        if any(token and math.isnan(token.logprob) for token in self._prompt_logprobs or ()):
            self._prompt_logprobs = None
            return self.failed("the model gave no finite logits")
        return self._output("", [], finish_reason="length")

    def failed(self, problem: str, status: int = 500) -> Output:
        """The end of an answer that cannot be given."""
        return self._output("", [], finish_reason="error", error=problem, status=status)

    def _output(self, text: str, token_ids: list[int], **rest: Any) -> Output:
        first, self._started = not self._started, True
        return Output(
            id=self.seq.request.id,
            index=self.seq.index,
            text=text,
            token_ids=token_ids,
            digest=self.digest,
            prompt_logprobs=self._prompt_logprobs if first else None,
            num_cached_tokens=self.seq.num_cached if first else 0,
            **rest,
        )
