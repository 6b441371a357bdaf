"""Preference rows: the prompt with each of its two answers, kept together from the row to the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ftray.core.errors import DataError
from ftray.data.spans import PAIR, ROLES, Row, Span

SIDES = ("chosen", "rejected")
"""The two documents of a pair, in their order."""


def sides(row: Row) -> tuple[Row, Row]:
    """A preference row as two ordinary ones: the prompt with the chosen answer, and with the rejected one."""
    kinds = [span.kind for span in row.spans]
    first, second = (kinds.index(side) for side in SIDES)
    prompt, chosen, rejected = row.spans[:first], row.spans[first:second], row.spans[second:]
    return _with_answer(prompt, chosen), _with_answer(prompt, rejected)


def _with_answer(prompt: Sequence[Span], answer: Sequence[Span]) -> Row:
    if any(span.kind in ROLES for span in prompt):
        return Row("messages", (*prompt, replace(answer[0], kind="assistant"), *answer[1:]))
    return Row("prompt_completion", (*prompt, replace(answer[0], kind="completion")))


def are_pairs(counts: Mapping[str, Any], where: object) -> bool:
    """True if the used rows of a data set are preference rows, from its counts.

    Raises:
        DataError: if some are and some are not: no objective learns from both.
    """
    pairs, documents = counts["pairs"], counts["documents"]
    if 0 < pairs < documents:
        raise DataError(
            f"{where}: {pairs:,} of {documents:,} rows are of the shape {PAIR}, the others are not; "
            "no objective learns from both, so name them in recipes of their own"
        )
    return bool(pairs)


def check_kind(manifest: Mapping[str, Any], *, pairs: bool, objective: str) -> None:
    """Refuse prepared rows that an objective cannot learn from.

    Args:
        manifest: of the prepared data set.
        pairs: true if the objective compares the two answers of preference rows.
        objective: its name, for the message.

    Raises:
        DataError: one line with the remedy.
    """
    if pairs and not manifest["pairs"]:
        raise DataError(
            f"objective: `{objective}` compares answers, and the rows hold no `chosen` and `rejected`; "
            "name preference rows, or train with `sft`"
        )
    if manifest["pairs"] and not pairs:
        raise DataError(
            f"objective: `{objective}` cannot compare the answers of {PAIR} rows; take one that does (`dpo`), or "
            "set `data.columns: {prompt: prompt, completion: chosen}` to learn the chosen answers alone"
        )
