"""What an evaluation found: counts, rates and differences, each with its 95 % interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ftray.eval.stats import Interval, paired_difference, rate_or_mean

if TYPE_CHECKING:
    from rich.table import Table

BASE = "base"
CONSTANT = "best constant answer"
RANKING = "base, ranking the answers"

How = Literal["generated", "ranked", "constant"]


@dataclass(frozen=True)
class Result:
    """One way of answering all questions."""

    model: str
    """`base`, a delta, `best constant answer` or `base, ranking the answers`."""
    how: How
    """How its answers came about."""
    answers: list[str]
    """Its answers, in the order of the questions."""
    scores: list[float]
    """Their scores."""

    @property
    def interval(self) -> Interval:
        """Rate (or mean score) with its 95 % interval."""
        return rate_or_mean(self.scores)


@dataclass(frozen=True)
class Difference:
    """How much better one result is than another on the same questions."""

    model: str
    minus: str
    interval: Interval


@dataclass(frozen=True)
class Report:
    """An evaluation."""

    metric: str
    """Name of the metric."""
    expected: list[str]
    """The expected answers."""
    results: list[Result]
    """Every way of answering; the base's own first."""
    constant: str
    """The best constant answer."""
    allowed: list[str]
    """The answers that were ranked."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """Rows that could not be asked: `file`, `offset`, `reason`."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers has to know."""

    def result(self, model: str) -> Result:
        """The result of one model."""
        return next(result for result in self.results if result.model == model)

    @property
    def differences(self) -> list[Difference]:
        """Every delta minus each result that is no delta."""
        tuned = [result for result in self.results if result.model not in (BASE, CONSTANT, RANKING)]
        plain = [result for result in self.results if result not in tuned]
        return [
            Difference(mine.model, other.model, paired_difference(mine.scores, other.scores))
            for mine in tuned
            for other in plain
        ]

    def beats_all(self, model: str) -> bool:
        """True if a delta is better than base, constant and ranking by margins whose intervals exclude zero."""
        margins = [item.interval for item in self.differences if item.model == model]
        return bool(margins) and all(margin.low > 0 for margin in margins)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "metric": self.metric,
            "rows": len(self.expected),
            "quarantined": self.quarantined,
            "best_constant_answer": self.constant,
            "allowed_answers": self.allowed,
            "results": [_result_json(result) for result in self.results],
            "differences": [
                {
                    "model": item.model,
                    "minus": item.minus,
                    **asdict(item.interval),
                    "excludes_zero": item.interval.excludes_zero,
                }
                for item in self.differences
            ],
            "notes": self.notes,
            "answers": {
                "expected": self.expected,
                **{r.model: r.answers for r in self.results if r.how != "constant"},
            },
        }


def _result_json(result: Result) -> dict[str, Any]:
    interval = result.interval
    return {
        "model": result.model,
        "how": result.how,
        "n": len(result.scores),
        "correct": sum(result.scores),
        "rate": interval.estimate,
        "low": interval.low,
        "high": interval.high,
    }


def score_table(report: Report) -> "Table":
    """Counts and rates with their intervals, for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "n", "correct", report.metric, "95 % interval")
    for column in table.columns[1:]:
        column.justify = "right"
    for result in report.results:
        interval = result.interval
        model = f"{CONSTANT} ({report.constant!r})" if result.how == "constant" else result.model
        table.add_row(
            escape(model),
            str(len(result.scores)),
            f"{sum(result.scores):g}",
            f"{interval.estimate:.3f}",
            f"{interval.low:.3f} to {interval.high:.3f}",
        )
    return table


def difference_table(differences: Sequence[Difference]) -> "Table":
    """Paired differences with their intervals, for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("difference", "estimate", "95 % interval", "excludes zero")
    for column in table.columns[1:]:
        column.justify = "right"
    for item in differences:
        low, high = item.interval.low, item.interval.high
        table.add_row(
            escape(f"{item.model} - {item.minus}"),
            f"{item.interval.estimate:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            "yes" if item.interval.excludes_zero else "no",
        )
    return table
