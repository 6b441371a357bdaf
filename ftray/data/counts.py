"""What became of the rows of many units, summed as they come."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ftray.data.work import Outcome

_SUMMED = ("rows", "documents", "pairs", "split", "truncated")
_BY_NAME = ("filtered", "changed", "bad")


class Counts:
    """Sums over outcomes; adding one takes no longer for those before it."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._named: dict[str, Counter[str]] = {name: Counter() for name in _BY_NAME}

    def add(self, outcome: Outcome) -> None:
        """Count a unit."""
        self._sums.update({name: getattr(outcome, name) for name in _SUMMED})
        for name, counter in self._named.items():
            counter.update(getattr(outcome, name))
        for shard in outcome.shards:
            self._sums["packed_rows"] += shard["rows"]
            self._sums["tokens"] += shard["tokens"]
            self._sums["targets"] += shard["targets"]

    def content(self, max_length: int) -> dict[str, Any]:
        """The counts as a manifest has them."""
        sums, filtered, bad = self._sums, self._named["filtered"], self._named["bad"]
        documents, rows, tokens = sums["documents"], sums["packed_rows"], sums["tokens"]
        assert sums["rows"] == documents + filtered.total() + bad.total(), (sums, self._named)
        return {
            "rows": sums["rows"],
            "documents": documents,
            "pairs": sums["pairs"],
            "split_documents": sums["split"],
            "split_documents_fraction": sums["split"] / max(1, documents),
            "truncated_documents": sums["truncated"],
            "filtered": dict(sorted(filtered.items())),
            "changed": dict(sorted(self._named["changed"].items())),
            "quarantined": dict(bad.most_common()),
            "packed_rows": rows,
            "padding_fraction": 1 - tokens / (rows * max_length) if rows else 0.0,
            "tokens": tokens,
            "targets": sums["targets"],
        }


def counts_of(outcomes: Iterable[Outcome], max_length: int) -> dict[str, Any]:
    """What became of the rows of some units."""
    counts = Counts()
    for outcome in outcomes:
        counts.add(outcome)
    return counts.content(max_length)
