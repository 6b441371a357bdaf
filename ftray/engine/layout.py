"""How rows lie on the token axis of a step: stretches of one delta, and which logits are wanted by whom."""

from collections.abc import Iterable

from ftray.adapt.route import Segment
from ftray.engine.answer import Answer
from ftray.engine.sequence import Row


class Layout:
    """Which places of a step's flattened token axis are wanted, and by whom.

    Args:
        rows: the rows of the step, in its order, and their answers.
    """

    def __init__(self, rows: Iterable[tuple[Row, Answer]]) -> None:
        self.keep: list[int] = []
        """Places whose logits are wanted."""
        self.prompt: list[int] = []
        """Which of `keep` give log-probabilities of prompt tokens."""
        self.prompt_places: list[tuple[Answer, int]] = []
        """Whose, and at which place of the sequence."""
        self.last: list[int] = []
        """Which of `keep` give a next token."""
        self.due: list[Answer] = []
        """Whose."""
        self.scored: list[Answer] = []
        """Answers that end with this step, for nothing was to be generated."""
        first = 0
        for row, answer in rows:
            for at in answer.prompt_places(row):
                self.prompt.append(self._keep(first + at - row.start))
                self.prompt_places.append((answer, at))
            first += row.length
            if row.samples and answer.scores_only:
                self.scored.append(answer)
            elif row.samples:
                self.last.append(self._keep(first - 1))
                self.due.append(answer)

    def _keep(self, place: int) -> int:
        self.keep.append(place)
        return len(self.keep) - 1


def segments_of(rows: list[Row], keys: list[str | None]) -> list[Segment]:
    """Neighbouring rows of one delta as one stretch of the token axis."""
    segments: list[Segment] = []
    first = 0
    for row, key in zip(rows, keys, strict=True):
        start = segments.pop()[1] if segments and segments[-1][0] == key else first
        first += row.length
        segments.append((key, start, first))
    return segments
