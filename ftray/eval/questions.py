"""Held-out rows as questions: a prompt rendered exactly as in training, and the answer that is expected.

The last learnt part of a row is its answer; what stands before it is the prompt. Rendering and tokenising are
those of data preparation, so an evaluation sees the same token boundaries as training and serving do.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftray.core.errors import DataError
from ftray.data.pairs import sides
from ftray.data.rows import BadRow, Row
from ftray.data.source import Record, Records, Unit, find_sources, parse_record, split_units
from ftray.data.spans import PAIR
from ftray.data.tokenise import Segment, Tokeniser


@dataclass(frozen=True)
class Question:
    """One prompt with the expected answer."""

    prompt_ids: list[int]
    """Tokens of the prompt."""
    expected: str
    """The answer's text."""
    row: Row | None = None
    """The row it comes from; needed to render other answers in its place."""
    file: str = ""
    """File of the row."""
    offset: int = 0
    """The row's first byte in it."""


@dataclass(frozen=True)
class Questions:
    """The questions of some files, and the rows that are none."""

    items: list[Question] = field(default_factory=list)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """`file`, `offset` (bytes) and `reason` of each row that cannot be asked."""


def read_questions(
    patterns: Sequence[str],
    tokeniser: Tokeniser,
    max_rows: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Questions:
    """Read questions from source files of any format.

    Args:
        patterns: files, globs, folders or URLs.
        tokeniser: the base's.
        max_rows: questions wanted; None: all.
        columns: fields of a shape and the columns that hold them.

    Raises:
        DataError: if no row can be asked.
    """
    found = Questions()
    asked: list[Question] = []
    prompts: list[list[Segment]] = []
    for unit, record in _records(patterns, columns):
        if max_rows is not None and len(asked) >= max_rows:
            break
        try:
            row = _parsed(unit, record, columns)
            prompts.append(_segments(row, tokeniser)[:-1])
            asked.append(Question([], answer_text(row), row, unit.file, record.offset))
        except BadRow as error:
            found.quarantined.append({"file": unit.file, "offset": record.offset, "reason": str(error)})
    for question, ids in zip(asked, tokeniser.encode(prompts), strict=True):
        found.items.append(replace(question, prompt_ids=[token for part in ids for token in part]))
    if not found.items:
        why = f"; the first: {found.quarantined[0]['reason']}" if found.quarantined else ""
        raise DataError(f"{', '.join(patterns)}: no row can be asked{why}")
    return found


def read_answers(patterns: Sequence[str], columns: Mapping[str, str] | None = None) -> list[str]:
    """The answers of all readable rows; for what is learnt from training rows, whose bad ones were reported."""
    answers = []
    for unit, record in _records(patterns, columns):
        with contextlib.suppress(BadRow):
            answers.append(answer_text(_parsed(unit, record, columns)))
    return answers


def _records(patterns: Sequence[str], columns: Mapping[str, str] | None) -> Iterator[tuple[Unit, Record]]:
    for unit in split_units(find_sources(patterns)):
        for record in Records(unit, columns):
            yield unit, record


def _parsed(unit: Unit, record: Record, columns: Mapping[str, str] | None) -> Row:
    """A row; of a preference pair the chosen answer is the expected one."""
    row = parse_record(unit, record, columns)
    return sides(row)[0] if row.shape == PAIR else row


def answer_text(row: Row) -> str:
    """The text of a row's last learnt part."""
    return row.spans[_last_target(row)].text


def answer_ids(question: Question, answers: Sequence[str], tokeniser: Tokeniser) -> list[list[int]]:
    """Tokens of each answer as a continuation of a question's prompt, its end of turn included.

    The end of turn makes sure that no answer is the beginning of another.
    """
    assert question.row is not None, "this question was not read from a row"
    rows = [_with_answer(question.row, answer) for answer in answers]
    encoded = tokeniser.encode([_segments(row, tokeniser)[-1:] for row in rows])
    return [parts[0] for parts in encoded]


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the first in the alphabet among equals: the best constant for exact match."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _segments(row: Row, tokeniser: Tokeniser) -> list[Segment]:
    if row.shape == "text":
        raise BadRow("no prompt; evaluation needs `messages` or `prompt` + `completion`")
    segments = tokeniser.segments(row)
    if len(segments) < 2:
        raise BadRow("nothing stands before the answer")
    return segments


def _last_target(row: Row) -> int:
    return max(index for index, span in enumerate(row.spans) if span.target)


def _with_answer(row: Row, answer: str) -> Row:
    last = _last_target(row)
    return replace(
        row, spans=(*row.spans[:last], replace(row.spans[last], text=answer), *row.spans[last + 1 :])
    )
