"""What clients and disturbers saw of an endpoint, and what of it breaks a promise."""

import collections
import threading
import time
from dataclasses import dataclass, field

from benchmarks.chaos_serve.versions import Said

MOST = (
    "slowest_switch_s",
    "slowest_recovery_s",
    "slowest_recovery_alone_s",
    "slowest_release_s",
    "longest_silence_s",
)
"""Of these counts the greatest is kept."""
WRONG = (
    "failed", "false_ends", "wrong_answers", "wrong_models", "bad_versions_served", "hangs",
    "foreign_answered", "without_retry_after", "other_statuses", "hostile_taken", "not_released",
)  # fmt: skip
"""Counts of what must never happen."""


@dataclass
class Counts:
    """What was seen; all of it adds up over slices, except `MOST`."""

    requests: int = 0
    answered: int = 0
    left_early: int = 0
    refused: int = 0
    """429 or 503 with the time after which to come again, where more was asked than can be answered."""
    foreign_refused: int = 0
    """404 for a delta of another tenant."""
    streams_ended_with_error: int = 0
    """Streams that had begun on a replica that was killed, and said so."""
    hostile_refused: int = 0
    """Uploads that were refused in one line."""
    keys_rotated: int = 0
    failed: int = 0
    """Requests that were refused or broken without having begun, where there was room."""
    false_ends: int = 0
    """Streams with `[DONE]` whose text is not whole."""
    wrong_answers: int = 0
    """Texts that are not those of the version whose digest was named."""
    wrong_models: int = 0
    """Answers of another delta than was asked."""
    bad_versions_served: int = 0
    foreign_answered: int = 0
    """Requests for another tenant's delta that got anything but 404."""
    without_retry_after: int = 0
    other_statuses: int = 0
    """Statuses that overload does not excuse."""
    hostile_taken: int = 0
    not_released: int = 0
    """Times something was still held long after everybody had left."""
    hangs: int = 0
    slowest_switch_s: float = 0.0
    slowest_recovery_s: float = 0.0
    """From a kill until the replacement has everything and is asked."""
    slowest_recovery_alone_s: float = 0.0
    """The same without the time in which the replacement waited for processors that others had."""
    longest_silence_s: float = 0.0
    """In which nobody was answered who asked."""
    slowest_release_s: float = 0.0
    """From the last client's leaving until nothing is held, as replicas report it."""


@dataclass
class Judge:
    """Counts from many threads.

    Args:
        said: what each version says, by its digest; may grow.
    """

    said: dict[str, Said]
    counts: Counts = field(default_factory=Counts)
    events: collections.Counter[str] = field(default_factory=collections.Counter)
    notes: list[str] = field(default_factory=list)
    _last_answer: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, note: str = "") -> None:
        """Count something, and keep a word of what it was."""
        with self._lock:
            setattr(self.counts, name, getattr(self.counts, name) + 1)
            if note and len(self.notes) < 20:
                self.notes.append(f"{name}: {note[:200]}")

    def most(self, name: str, seconds: float) -> None:
        """Keep the greatest."""
        with self._lock:
            setattr(self.counts, name, max(getattr(self.counts, name), round(seconds, 2)))

    def answer(self, model: str, question: int, num_tokens: int, digest: str, text: str) -> None:
        """Compare an answer with what the version that is named says alone, and the version with what was asked."""
        said = self.said.get(digest)
        if said is None or said.name != model.partition("@")[0]:
            self.count("wrong_models", f"{model}: {digest} answered")
        elif said.bad:
            self.count("bad_versions_served", digest)
        elif said.texts[question, num_tokens] != text:
            self.count("wrong_answers", f"{digest}: {text!r}")
        self.count("answered")
        now = time.monotonic()
        self.most("longest_silence_s", now - (self._last_answer or now))
        self._last_answer = now

    def quiet(self) -> None:
        """Nobody asks for a while."""
        self._last_answer = None

    def wrong(self) -> int:
        """How often something happened that must never happen."""
        return sum(getattr(self.counts, name) for name in WRONG)
