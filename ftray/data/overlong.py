"""What becomes of documents longer than a row: split, rejected, or cut at the left.

`split` keeps every target. `truncate_left` keeps the end of a document and never part of a reply: a cut inside
one drops that reply whole, and a document whose last reply does not fit is filtered out.

The documents of a group (a preference pair) share one row. They are never split, and `truncate_left` takes the same
number of tokens from the context of each, so that they still have it in common.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from ftray.data.pack import Pieces, cut, whole
from ftray.data.read import IGNORE_INDEX
from ftray.data.tokenise import Tokenised

Overlong = Literal["split", "reject", "truncate_left"]
Labels = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fitted:
    """Pieces of at most a row, and what was done for it, counted in source rows."""

    pieces: Pieces
    """What is packed."""
    rows: int
    """Rows that stay."""
    split: int = 0
    """Rows cut into several pieces."""
    truncated: int = 0
    """Rows cut at the left."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Rows filtered out, by rule; a row goes with all its documents."""
    groups: Ints | None = None
    """How many pieces belong together, as `pack` takes them."""


def fit(found: Tokenised, capacity: int, policy: Overlong) -> Fitted:
    """Apply a policy to the documents (and groups) of more than `capacity` tokens."""
    if found.groups is not None:
        return _fit_groups(found, found.groups, capacity, policy)
    documents, row_of = found.documents, found.row_of
    long = documents.lens > capacity
    long_rows, rows = np.unique(row_of[long]), len(np.unique(row_of))
    if policy == "split":
        return Fitted(cut(documents, capacity), rows, split=len(long_rows))
    every = whole(documents)
    starts = every.starts.copy()
    ends = every.starts + every.lens
    if policy == "truncate_left":
        for index in np.flatnonzero(long):
            window = documents.labels[ends[index] - capacity : ends[index]]
            starts[index] = ends[index] - capacity + _first_context(window)
        lost = np.unique(row_of[starts == ends])
        rule = "overlong_reply"
    else:
        lost, rule = long_rows, "overlong"
    stay = ~np.isin(row_of, lost)
    return Fitted(
        Pieces(starts[stay], (ends - starts)[stay]),
        rows - len(lost),
        truncated=len(np.setdiff1d(long_rows, lost)),
        filtered=Counter({rule: len(lost)} if len(lost) else {}),
    )


def _fit_groups(found: Tokenised, groups: Ints, capacity: int, policy: Overlong) -> Fitted:
    every = whole(found.documents)
    firsts, of_piece = np.cumsum(groups) - groups, np.repeat(np.arange(len(groups)), groups)
    excess = np.maximum(0, np.bincount(of_piece, every.lens, len(groups)).astype(np.int64) - capacity)
    cuts, rule = np.zeros_like(groups), "overlong"
    stay = excess == 0
    if policy == "truncate_left":
        cuts, rule = -(-excess // groups), "overlong_reply"
        # One token of the context stays: the first of the reply is predicted from it.
        stay = cuts < np.array(
            [min(_contexts(found, every, *ends)) for ends in zip(firsts, groups, strict=True)]
        )
    lost = np.unique(found.row_of[firsts[~stay]])
    stay = ~np.isin(found.row_of[firsts], lost)
    kept = stay[of_piece]
    return Fitted(
        Pieces((every.starts + cuts[of_piece])[kept], (every.lens - cuts[of_piece])[kept]),
        len(np.setdiff1d(found.row_of, lost)),
        truncated=int((stay & (cuts > 0)).sum()),
        filtered=Counter({rule: len(lost)} if len(lost) else {}),
        groups=groups[stay],
    )


def _contexts(found: Tokenised, every: Pieces, first: int, size: int) -> Iterator[int]:
    """Tokens before the first target of each document of a group."""
    for index in range(first, first + size):
        labels = found.documents.labels[every.starts[index] :]
        yield int(np.argmax(labels != IGNORE_INDEX))


def _first_context(labels: Labels) -> int:
    """Where a window may begin so that no reply in it is cut; its length if no whole reply is left."""
    context = np.flatnonzero(labels == IGNORE_INDEX)
    if not len(context):
        return len(labels)
    first = int(context[0])
    return first if (labels[first:] != IGNORE_INDEX).any() else len(labels)
