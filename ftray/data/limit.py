"""End a preparation early that cannot end well."""

from collections import Counter

from ftray.data.work import Outcome

_ROWS = 1000
_MARGIN = 4.0
"""How many rows there will be is told from the bytes of those read so far, and that many times more allowed for."""


class QuarantineLimit:
    """Tells when the rows in quarantine will be too many although all that follow are good.

    Args:
        max_quarantine: share of all rows that may be in quarantine.
        total_bytes: of the sources.
    """

    def __init__(self, max_quarantine: float, total_bytes: int) -> None:
        self._allowed, self._total_bytes, self._bytes = max_quarantine, total_bytes, 0
        self.rows = 0
        """Rows read so far."""
        self.quarantined: Counter[str] = Counter()
        """Those that cannot be used, by reason."""

    def passed(self, outcome: Outcome) -> bool:
        """Count a unit; True if there is no hope any more."""
        self.rows += outcome.rows
        self._bytes += outcome.unit.stop - outcome.unit.start
        self.quarantined.update(record["reason"] for record in outcome.quarantined)
        expected = _MARGIN * self.rows * self._total_bytes / max(1, self._bytes)
        return self.rows >= _ROWS and self.quarantined.total() > self._allowed * expected
