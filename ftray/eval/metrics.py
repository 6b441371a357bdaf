"""How one answer is scored against the expected one."""

from typing import Protocol

from ftray.core.spec import spec


class Metric(Protocol):
    """Scores answers; a catalog piece of kind `metric`."""

    def score(self, prediction: str, expected: str) -> float:
        """Score of one answer, 0 (wrong) to 1 (right)."""
        ...


@spec
class ExactMatch:
    """1 if the answer is the expected text, spaces around both left aside, else 0."""

    ignore_case: bool = False
    """Take upper and lower case for the same."""

    def score(self, prediction: str, expected: str) -> float:
        """Score of one answer."""
        prediction, expected = prediction.strip(), expected.strip()
        if self.ignore_case:
            prediction, expected = prediction.casefold(), expected.casefold()
        return float(prediction == expected)
