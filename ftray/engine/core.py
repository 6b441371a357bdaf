"""The step loop: admission, one forward pass, a token for every row that is due, text for the client.

What differs between engines is a `Runner`: how a step's rows become logits and how a delta is put in place.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ftray.core.errors import DeltaError, RequestError
from ftray.engine.api import EngineInfo, EngineStats, FinishReason, Output, Request, Sampling, ScoreItem
from ftray.engine.sampling import Draws, sample
from ftray.engine.scheduler import Row, Scheduler, Sequence
from ftray.engine.text import Detokeniser, StopStrings


class Runner(Protocol):
    """Computes logits; holds the model, the cache and the deltas' tensors."""

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
        """A sequence is gone; drop what is kept for it."""
        ...

    def load(self, key: str, folder: str) -> None:
        """Put a delta in place under a key. Raises `DeltaError`."""
        ...

    def unload(self, key: str) -> None:
        """Remove the delta of a key."""
        ...


@dataclass(frozen=True)
class _Slot:
    order: int
    key: str


@dataclass
class _Stream:
    """What turns a sequence's tokens into text."""

    draws: Draws
    text: Detokeniser
    stop: StopStrings


class StepEngine:
    """An `Engine` over a runner.

    Args:
        runner: computes the logits.
        tokenizer: the base's tokenizer.
        scheduler: decides what runs.
        info: facts to report.
        eos_ids: tokens that end an answer.
    """

    def __init__(
        self, runner: Runner, tokenizer: Any, scheduler: Scheduler, info: EngineInfo, eos_ids: Iterable[int]
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self._runner = runner
        self._eos = frozenset(eos_ids)
        self._slots: dict[str, _Slot] = {}
        self._keys: dict[int, str | None] = {0: None}
        self._orders = itertools.count(1)
        self._streams: dict[str, _Stream] = {}

    def add(self, request: Request) -> None:
        """See `Engine.add`."""
        self.scheduler.add(request, self._slot(request.delta).order)
        sampling = request.sampling
        detokeniser = Detokeniser(self.tokenizer, request.prompt_ids)
        self._streams[request.id] = _Stream(Draws(sampling), detokeniser, StopStrings(sampling.stop))

    def step(self) -> list[Output]:
        """See `Engine.step`."""
        rows = self.scheduler.schedule()
        if not rows:
            return []
        due = [row for row in rows if row.samples]
        ends = itertools.accumulate(row.length for row in rows)
        logits = self._forward(rows, [end - 1 for end, row in zip(ends, rows, strict=True) if row.samples])
        tokens = sample(logits, [self._streams[row.seq.request.id].draws for row in due])
        return [self._take(row.seq, token) for row, token in zip(due, tokens, strict=True)]

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        if seq := self.scheduler.get(request_id):
            self._drop(seq)

    def has_work(self) -> bool:
        """See `Engine.has_work`."""
        return bool(self.scheduler.num_running or self.scheduler.num_waiting)

    def load_delta(self, name: str, folder: str) -> None:
        """See `Engine.load_delta`."""
        if name in self._slots:
            raise DeltaError(f"{name}: already loaded; unload it first or use another name")
        order = next(self._orders)
        # Keys are never used twice, so nothing is answered by what an earlier holder of a name left behind.
        slot = _Slot(order, f"slot{order}")
        self._runner.load(slot.key, folder)
        self._slots[name] = slot
        self._keys[order] = slot.key

    def unload_delta(self, name: str) -> None:
        """See `Engine.unload_delta`."""
        if name not in self._slots:
            raise DeltaError(f"{name}: not loaded; loaded are: {', '.join(self._slots) or 'none'}")
        if any(seq.request.delta == name for seq in self.scheduler.sequences()):
            raise DeltaError(f"{name}: requests under it are in flight; wait for them or cancel them")
        slot = self._slots.pop(name)
        del self._keys[slot.order]
        self._runner.unload(slot.key)

    def deltas(self) -> list[str]:
        """See `Engine.deltas`."""
        return list(self._slots)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        pool = self.scheduler.pool
        return EngineStats(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            blocks_used=pool.num_blocks - pool.num_free,
            blocks_total=pool.num_blocks,
        )

    def generate(self, requests: Iterable[Request]) -> list[Output]:
        """See `Engine.generate`."""
        parts: dict[str, list[Output]] = {}
        try:
            for request in requests:
                self.add(request)
                parts[request.id] = []
            while self.has_work():
                for output in self.step():
                    parts.setdefault(output.id, []).append(output)
        except BaseException:
            for request_id in parts:
                self.cancel(request_id)
            raise
        return [_joined(request_id, outputs) for request_id, outputs in parts.items()]

    def score(self, items: Iterable[ScoreItem]) -> list[float]:
        """See `Engine.score`."""
        assert not self.has_work(), "scoring and generating do not mix"
        totals: dict[str, float] = {}
        wanted: dict[str, ScoreItem] = {}
        try:
            for number, item in enumerate(items):
                if not item.prompt_ids or not item.completion_ids:
                    raise RequestError("score: a prompt and a completion need at least one token each")
                prompt = [*item.prompt_ids, *item.completion_ids][:-1]
                sampling = Sampling(max_tokens=1)
                request = Request(id=str(number), prompt_ids=prompt, delta=item.delta, sampling=sampling)
                self.scheduler.add(request, self._slot(item.delta).order)
                totals[request.id], wanted[request.id] = 0.0, item
            while rows := self.scheduler.schedule():
                self._score_step(rows, wanted, totals)
        except BaseException:
            for request_id in totals:
                self.cancel(request_id)
            raise
        return list(totals.values())

    def _score_step(self, rows: list[Row], wanted: dict[str, ScoreItem], totals: dict[str, float]) -> None:
        keep, targets, owners, first = [], [], [], 0
        for row in rows:
            item = wanted[row.seq.request.id]
            for at in range(max(row.start, len(item.prompt_ids) - 1), row.start + row.length):
                keep.append(first + at - row.start)
                targets.append(item.completion_ids[at + 1 - len(item.prompt_ids)])
                owners.append(row.seq.request.id)
            first += row.length
        logits = self._forward(rows, keep)
        if keep:
            target = torch.tensor(targets, device=logits.device)[:, None]
            logprobs = torch.log_softmax(logits.float(), -1).gather(1, target)[:, 0].tolist()
            for owner, logprob in zip(owners, logprobs, strict=True):
                totals[owner] += logprob
        for row in rows:
            if row.samples:
                self._drop(row.seq)

    def _forward(self, rows: list[Row], keep: list[int]) -> torch.Tensor:
        logits = self._runner.forward(rows, [self._keys[row.seq.slot] for row in rows], keep)
        self.scheduler.advance(rows)
        return logits

    def _take(self, seq: Sequence, token: int | None) -> Output:
        """Give a sequence its next token and return what its client gains by it."""
        stream, sampling = self._streams[seq.request.id], seq.request.sampling
        if token is None:
            self._drop(seq)
            problem = "the model gave no finite logits"
            return Output(id=seq.request.id, text="", token_ids=[], finish_reason="error", error=problem)
        seq.tokens.append(token)
        ended = token in self._eos and not sampling.ignore_eos
        text = stream.stop.feed("" if ended else stream.text.feed([token]))
        reason: FinishReason | None = None
        if ended or stream.stop.met:
            reason = "stop"
        elif seq.num_generated >= sampling.max_tokens:
            reason = "length"
        if reason:
            if not stream.stop.met:
                text += stream.stop.feed(stream.text.finish())
                text += stream.stop.finish()
                reason = "stop" if stream.stop.met else reason
            self._drop(seq)
        return Output(id=seq.request.id, text=text, token_ids=[token], finish_reason=reason)

    def _drop(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self._runner.release(seq)
        self._streams.pop(seq.request.id, None)

    def _slot(self, delta: str | None) -> _Slot:
        if delta is None:
            return _Slot(0, "")
        if delta not in self._slots:
            raise RequestError(
                f"delta: {delta!r} is not loaded", status=404, code="model_not_found", param="model"
            )
        return self._slots[delta]


def _joined(request_id: str, parts: list[Output]) -> Output:
    return Output(
        id=request_id,
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
        finish_reason=parts[-1].finish_reason,
        error=parts[-1].error,
    )
