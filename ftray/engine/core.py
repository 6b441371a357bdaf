"""The step loop: admission, one forward pass, a token for every row that is due, text for the client.

What differs between engines is a `Runner`: how a step's rows become logits and how a delta is put in place.
"""

import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from ftray.core.errors import DeltaError, FtrayError, RequestError
from ftray.engine.answer import Answer
from ftray.engine.api import (
    DeltaInfo,
    EngineInfo,
    EngineStats,
    Output,
    Request,
    Sampling,
    ScoreItem,
    Source,
    TokenLogprob,
)
from ftray.engine.entry import Entry, refusal
from ftray.engine.layout import Layout
from ftray.engine.logprobs import token_logprobs
from ftray.engine.places import Places
from ftray.engine.prefix import chain_seed
from ftray.engine.sampling import sample
from ftray.engine.scheduler import Row, Scheduler, Sequence
from ftray.engine.slots import Slots
from ftray.engine.whole import generate

_PAUSE_S = 0.02
"""Longest sleep of a step that has nothing to compute because deltas are still being read."""


class Runner(Places, Protocol):
    """Computes logits; holds the model, the cache and the deltas' tensors."""

    vocab_size: int
    """Token ids that the model has, which may be fewer than its tokenizer's."""

    def forward(self, rows: list[Row], keys: list[str | None], keep: list[int]) -> torch.Tensor:
        """Run one step.

        Args:
            rows: what to compute; rows of one delta stand together.
            keys: key of each row's delta, None for the base.
            keep: places on the flattened token axis whose logits are wanted, ascending.

        Returns:
            Logits `[len(keep), vocabulary]`.
        """
        ...

    def release(self, seq: Sequence) -> None:
        """A sequence runs no more, for now or for good; drop what is kept for it."""
        ...


class StepEngine:
    """An `Engine` over a runner.

    Args:
        runner: computes the logits.
        tokenizer: the base's tokenizer.
        scheduler: decides what runs.
        info: facts to report.
        eos_ids: tokens that end an answer.
        kv_facts: all that keys and values depend on besides base, tenant, delta and tokens; None: prefixes are
            not shared.
        max_host: deltas kept in memory that are not in place; how many are in place is `info.max_slots`.
        max_own: deltas in place with weights of their own.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        scheduler: Scheduler,
        info: EngineInfo,
        eos_ids: Iterable[int],
        *,
        kv_facts: str | None = None,
        max_host: int = 0,
        max_own: int = 1,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        scheduler.gate = self
        self._runner = runner
        self._slots = Slots(runner, info.max_slots, max_host, max_own)
        self._eos = frozenset(eos_ids)
        self._kv_facts = kv_facts
        self._answers: dict[Sequence, Answer] = {}
        self._num_generated = 0

    def add(self, request: Request) -> None:
        """See `Engine.add`."""
        entry = None
        if request.delta is not None and (entry := self._slots.find(request.delta)) is None:
            message = f"delta: {request.delta!r} is not loaded"
            raise RequestError(message, status=404, code="model_not_found", param="model")
        request.check_ids(self._runner.vocab_size)
        for seq in self.scheduler.add(request):
            digest = entry.digest if entry else self.info.base_digest
            self._answers[seq] = Answer(seq, self.tokenizer, self._eos, digest)
            seq.delta = entry
            if entry:
                self._slots.arrive(entry)

    def step(self) -> list[Output]:
        """See `Engine.step`."""
        outputs = [output for entry in self._slots.poll() for output in self._refuse(entry)]
        rows = self.scheduler.schedule()
        # Deltas were put in place by now: that is part of no token's price.
        start = time.perf_counter()
        if rows:
            outputs += self._run(rows)
            if self.scheduler.pace:
                self.scheduler.pace.note(sum(row.length - 1 for row in rows), time.perf_counter() - start)
        elif not outputs and self.has_work():
            self._slots.wait(_PAUSE_S)
        return outputs

    def _run(self, rows: list[Row]) -> list[Output]:
        layout = Layout([(row, self._answers[row.seq]) for row in rows])
        logits = self._runner.forward(
            rows, [row.seq.delta and row.seq.delta.key for row in rows], layout.keep
        )
        self.scheduler.advance(rows)
        self._note_prompts(layout, logits)
        outputs = self._take(layout.due, logits[layout.last] if layout.prompt else logits)
        for answer in layout.scored:
            outputs.append(answer.scored())
            self._drop(answer.seq)
        return outputs

    def _note_prompts(self, layout: Layout, logits: torch.Tensor) -> None:
        if not layout.prompt:
            return
        tokens = [answer.seq.tokens[at + 1] for answer, at in layout.prompt_places]
        num_top = [answer.seq.request.sampling.prompt_logprobs or 0 for answer, _ in layout.prompt_places]
        found = token_logprobs(logits[layout.prompt], tokens, num_top)
        for (answer, _), logprob in zip(layout.prompt_places, found, strict=True):
            answer.note_prompt(logprob)

    def _take(self, due: list[Answer], logits: torch.Tensor) -> list[Output]:
        """Give every answer that is due its next token."""
        if not due:
            return []
        tokens = sample(logits, [answer.draws for answer in due])
        logprobs = self._logprobs(due, tokens, logits)
        outputs = []
        for place, (answer, token) in enumerate(zip(due, tokens, strict=True)):
            if token is None:
                # Nobody is to find keys and values that may be as bad.
                self.scheduler.pool.forget(answer.seq.blocks)
                output = answer.failed("the model gave no finite logits")
            else:
                self._num_generated += 1
                output = answer.take(token, logprobs.get(place))
            if output.finish_reason:
                self._drop(answer.seq)
            outputs.append(output)
        return outputs

    def _logprobs(
        self, due: list[Answer], tokens: list[int | None], logits: torch.Tensor
    ) -> dict[int, TokenLogprob]:
        """Log-probabilities of the tokens just chosen, by row, where they were asked for."""
        num_top = [answer.seq.request.sampling.logprobs for answer in due]
        places = [at for at, top in enumerate(num_top) if top is not None and tokens[at] is not None]
        if not places:
            return {}
        chosen = [tokens[at] or 0 for at in places]
        found = token_logprobs(logits[places], chosen, [num_top[at] or 0 for at in places])
        return dict(zip(places, found, strict=True))

    def _refuse(self, entry: Entry) -> list[Output]:
        """End what waits for a delta that cannot be had."""
        outputs = []
        problem, status = refusal(entry)
        for seq in [seq for seq in self.scheduler.sequences() if seq.delta is entry]:
            outputs.append(self._answers[seq].failed(problem, status))
            self._drop(seq)
        return outputs

    def _drop(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        del self._answers[seq]
        if seq.delta is not None:
            self._slots.depart(seq.delta)

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        for seq in self.scheduler.get(request_id):
            self._drop(seq)

    def has_work(self) -> bool:
        """See `Engine.has_work`."""
        return bool(self._answers)

    def load_delta(self, name: str, folder: str, *, replace: bool = False) -> None:
        """See `Engine.load_delta`."""
        self._slots.load(name, folder, replace)

    def register_delta(self, name: str, source: Source) -> None:
        """See `Engine.register_delta`."""
        self._slots.register(name, source)

    def unload_delta(self, name: str) -> None:
        """See `Engine.unload_delta`."""
        self._slots.unload(name)

    def deltas(self) -> list[str]:
        """See `Engine.deltas`."""
        return self._slots.names()

    def delta_info(self, name: str) -> DeltaInfo:
        """See `Engine.delta_info`."""
        return self._slots.info(name)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        pool = self.scheduler.pool
        return EngineStats(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            blocks_used=pool.num_blocks - pool.num_free,
            blocks_total=pool.num_blocks,
            blocks_cached=pool.num_kept,
            slots_used=self._slots.num_placed,
            slots_total=self.info.max_slots,
            loading=self._slots.num_reading,
            prompt_tokens=self.scheduler.num_prompt,
            cached_tokens=self.scheduler.num_cached,
            generated_tokens=self._num_generated,
            recomputed_tokens=self.scheduler.num_recomputed,
            preemptions=self.scheduler.num_preempted,
            delta_loads=self._slots.num_loads,
            delta_reads=self._slots.num_reads,
            step_s=self.scheduler.pace.step_s if self.scheduler.pace else 0.0,
            tenant_tokens=self.scheduler.shares.tokens(),
        )

    def generate(self, requests: Iterable[Request]) -> list[Output]:
        """See `Engine.generate`."""
        return generate(self, requests)

    def score(self, items: Iterable[ScoreItem]) -> list[float]:
        """See `Engine.score`."""
        assert not self.has_work(), "scoring takes the outputs of every step"
        requests = []
        for number, item in enumerate(items):
            if not item.prompt_ids or not item.completion_ids:
                raise RequestError("score: a prompt and a completion need at least one token each")
            sampling = Sampling(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=len(item.prompt_ids))
            ids = [*item.prompt_ids, *item.completion_ids]
            requests.append(Request(id=str(number), prompt_ids=ids, delta=item.delta, sampling=sampling))
        totals = []
        for output in self.generate(requests):
            if output.error:
                raise DeltaError(output.error) if output.status < 500 else FtrayError(output.error)
            found = output.prompt_logprobs or []
            totals.append(sum(token.logprob for token in found if token))
        return totals

    def enter(self, seq: Sequence) -> bool:
        """See `Gate.enter`."""
        if self._kv_facts is not None and any(
            other is not seq and other.index == 0 and not other.num_generated
            for other in self.scheduler.get(seq.request.id)
        ):
            return False  # the prompt is computed once, by the first answer, and found in the cache
        entry: Entry | None = seq.delta
        if entry is not None:
            if not self._slots.enter(entry):
                return False
            seq.slot, seq.group = entry.slot, 0 if entry.mixed_batch else entry.slot
            self._answers[seq].digest = entry.digest
        seq.seed = self._seed(seq.request, entry)
        return True

    def leave(self, seq: Sequence) -> None:
        """See `Gate.leave`."""
        self._runner.release(seq)
        if seq.delta is not None:
            self._slots.leave(seq.delta)

    def _seed(self, request: Request, entry: Entry | None) -> bytes | None:
        if self._kv_facts is None:
            return None
        delta = entry.digest if entry else ""
        facts = (self.info.base_digest, request.tenant, delta, request.cache_salt, self._kv_facts)
        return chain_seed(facts)
