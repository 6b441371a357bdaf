"""Put documents into rows of at most `max_length` tokens, losing none.

Best-fit decreasing over capacity buckets (the packing of Ding et al., arXiv:2404.10830): a document goes into
the fullest row that still holds it. Documents that are too long are cut into pieces that overlap by one
token: the last of a piece is the context from which the first target of the next is predicted, so every
target of a document is a target exactly once, cut or not.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ftray.data.read import IGNORE_INDEX
from ftray.data.tokenise import Documents

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Where whole or cut documents stand in the flat token arrays."""

    starts: Ints
    """First token of each piece."""
    lens: Ints
    """Tokens of each piece, at most the capacity."""


@dataclass(frozen=True)
class Packed:
    """R rows of whole pieces."""

    documents: Documents
    """The pieces in the order of the rows; `lens` holds the tokens of each piece."""
    docs_per_row: Ints
    """Pieces in each row, [R]."""
    tokens_per_row: Ints
    """Tokens in each row, [R]."""
    group_lens: Ints
    """Pieces of each group, in the order of the rows, [G]."""
    groups_per_row: Ints
    """Groups in each row, [R]."""


def whole(documents: Documents) -> Pieces:
    """Every document as one piece."""
    return Pieces(np.cumsum(documents.lens) - documents.lens, documents.lens)


def cut(documents: Documents, capacity: int) -> Pieces:
    """Documents cut into pieces of at most `capacity` tokens that overlap by one token.

    Pieces without a target (a long prompt) are left out, since attention does not reach across pieces.
    """
    pieces = whole(documents)
    stride = capacity - 1
    counts = np.maximum(1, -(-(pieces.lens - 1) // stride))
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(pieces.starts, counts) + place * stride
    ends = np.repeat(pieces.starts + pieces.lens, counts)
    lens = np.minimum(capacity, ends - starts)
    # The first token of a piece is context.
    used = documents.have_targets(starts + 1, starts + lens)
    return Pieces(starts[used], lens[used])


def best_fit(lens: Ints, capacity: int) -> tuple[Ints, int]:
    """Assign pieces to rows, longest first.

    Returns:
        The row of each piece, and the number of rows.
    """
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free tokens
    free_sizes = 0  # bit c is set while a row with c free tokens exists
    row_of = np.empty(len(lens), np.int64)
    num_rows = 0
    order = np.argsort(-lens, kind="stable")
    for index, length in zip(order.tolist(), lens[order].tolist(), strict=True):
        fitting = free_sizes >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[free].pop()
            if not rows_with[free]:
                free_sizes ^= 1 << free
        else:
            free, row = capacity, num_rows
            num_rows += 1
        row_of[index] = row
        free -= length
        if free:
            rows_with[free].append(row)
            free_sizes |= 1 << free
    return row_of, num_rows


def pack(
    documents: Documents, pieces: Pieces, capacity: int, *, packing: bool, groups: Ints | None = None
) -> Packed:
    """Lay pieces out in rows.

    Args:
        documents: what the pieces are cut from.
        pieces: none longer than the capacity.
        capacity: tokens in a row.
        packing: several groups in a row; otherwise each is a row of its own.
        groups: how many pieces, in their order, belong together (a pair, a group of answers) and stay in one row,
            next to each other; they sum to the number of pieces. None: each piece by itself.

    Raises:
        ValueError: if a group is longer than a row, which it must not be cut for.
    """
    sizes = np.ones(len(pieces.lens), np.int64) if groups is None else groups
    lens = np.add.reduceat(pieces.lens, np.cumsum(sizes) - sizes) if len(sizes) else pieces.lens
    if len(lens) and lens.max() > capacity:
        raise ValueError(
            f"a group of {lens.max()} tokens does not fit a row of {capacity}; filter it out before"
        )
    group_rows, num_rows = best_fit(lens, capacity) if packing else (np.arange(len(lens)), len(lens))
    row_of = np.repeat(group_rows, sizes)
    order = np.argsort(row_of, kind="stable")
    lens = pieces.lens[order]
    ends = np.cumsum(lens)
    firsts = ends - lens
    source = np.arange(int(lens.sum())) + np.repeat(pieces.starts[order] - firsts, lens)
    labels, weights = documents.labels[source], documents.weights[source]
    labels[firsts], weights[firsts] = IGNORE_INDEX, 0.0
    return Packed(
        Documents(documents.input_ids[source], labels, weights, lens),
        np.bincount(row_of, minlength=num_rows),
        np.bincount(row_of, weights=pieces.lens, minlength=num_rows).astype(np.int64),
        sizes[np.argsort(group_rows, kind="stable")],
        np.bincount(group_rows, minlength=num_rows),
    )
