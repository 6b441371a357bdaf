"""One request of a client, from its arrival to its last byte: its time, its quota, what is written down of it."""

import logging
from collections import Counter

from ftray.serve.backend import ServedModel
from ftray.serve.limits import Deadline
from ftray.serve.metrics import UNKNOWN, Metrics
from ftray.serve.quota import Admission
from ftray.serve.replies import Usage
from ftray.serve.tenants import Caller
from ftray.serve.usage import UsageLog

logger = logging.getLogger(__name__)

_NOT_COMPUTED = frozenset({400, 404, 429, 503})
"""Statuses of requests that engines refuse, which cost their tenants nothing."""


class Exchange:
    """Bookkeeping of one request; `end` closes it, once.

    Args:
        id: the request's id.
        caller: who asks.
        deadline: its time.
        in_flight: where it counts while it lasts.
        metrics: where it is counted.
        log: where its line is written.
    """

    def __init__(
        self,
        id: str,
        caller: Caller,
        deadline: Deadline,
        in_flight: "Counter[ServedModel]",
        metrics: Metrics,
        log: UsageLog,
    ) -> None:
        self.id = id
        self.caller = caller
        self.deadline = deadline
        self.usage = Usage(0)
        self.model: ServedModel | None = None
        self.admission: Admission | None = None
        self.sent = False
        """Whether an engine was asked; whoever leaves from then on pays for the prompt."""
        self.started = False
        self._in_flight = in_flight
        self._metrics = metrics
        self._log = log
        self._ended = False
        metrics.in_flight.inc()

    def bind(self, model: ServedModel) -> None:
        """Note what is asked; the model counts as in use until the end."""
        self.model = model
        self._in_flight[model] += 1

    def first_token(self) -> None:
        """Note that the answer has begun."""
        if not self.started and self.model:
            self.started = True
            self._metrics.first_token(self.model.id, self.deadline.elapsed_s)

    def end(self, status: int) -> None:
        """Free what the request held and write it down."""
        if self._ended:
            return
        self._ended = True
        computed = self.started or (self.sent and status not in _NOT_COMPUTED)
        prompt = self.usage.prompt_tokens if computed else 0
        self._metrics.in_flight.dec()
        if self.admission:
            self.admission.close(prompt + self.usage.completion_tokens)
        label = self.model.id if self.model else UNKNOWN
        if self.model:
            self._in_flight[self.model] -= 1
            if self._in_flight[self.model] <= 0:
                del self._in_flight[self.model]
        self._metrics.count(self.caller.name, label, status, prompt, self.usage.completion_tokens)
        self._write(status, prompt)

    def _write(self, status: int, prompt_tokens: int) -> None:
        model = self.model
        record = {
            "id": self.id,
            "tenant": self.caller.name,
            "model": model.id if model else None,
            "ref": model.ref if model else None,
            "digest": model.digest if model else None,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.usage.completion_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "status": status,
            "seconds": round(self.deadline.elapsed_s, 4),
        }
        try:
            self._log.write(record)
        except OSError as error:  # a full disk must not fail answers that were given
            logger.error("usage not written: %s", error.strerror)
