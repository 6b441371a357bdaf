"""Packing: nothing is lost, rows are full, and every target stays a target exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.data.pack import Packed, best_fit, cut, pack, whole
from ftray.data.read import IGNORE_INDEX
from ftray.data.tokenise import Documents

Spec = list[tuple[int, int]]


def documents(lens_and_context: Spec) -> Documents:
    """Documents of (length, context tokens); every token id is unique."""
    lens = np.array([length for length, _ in lens_and_context], np.int64)
    input_ids = np.arange(lens.sum(), dtype=np.int32)
    weights = np.ones(lens.sum(), np.float32)
    for start, (_, context) in zip(np.cumsum(lens) - lens, lens_and_context, strict=True):
        weights[start : start + max(1, context)] = 0
    labels = np.where(weights > 0, input_ids, np.int32(IGNORE_INDEX)).astype(np.int32)
    return Documents(input_ids, labels, weights, lens)


def targets(labels: np.ndarray) -> list[int]:
    return sorted(labels[labels != IGNORE_INDEX].tolist())


def check(packed: Packed, capacity: int) -> None:
    docs = packed.documents
    assert packed.tokens_per_row.max(initial=0) <= capacity
    assert packed.docs_per_row.sum() == len(docs.lens)
    assert packed.tokens_per_row.sum() == docs.lens.sum() == len(docs.input_ids)
    row_of = np.repeat(np.arange(len(packed.docs_per_row)), packed.docs_per_row)
    sums = np.bincount(row_of, weights=docs.lens, minlength=len(packed.docs_per_row))
    assert np.array_equal(sums, packed.tokens_per_row)
    firsts = np.cumsum(docs.lens) - docs.lens
    assert (docs.labels[firsts] == IGNORE_INDEX).all() and (docs.weights[firsts] == 0).all()
    is_target = docs.labels != IGNORE_INDEX
    assert np.array_equal(is_target, docs.weights > 0)
    assert np.array_equal(docs.labels[is_target], docs.input_ids[is_target])


lens_and_context = st.lists(st.tuples(st.integers(2, 60), st.integers(0, 70)), min_size=1, max_size=40)


@given(lens_and_context, st.integers(8, 64), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_target_is_kept_exactly_once(spec: Spec, capacity: int, packing: bool) -> None:
    docs = documents(spec)
    packed = pack(docs, cut(docs, capacity), capacity, packing=packing)
    check(packed, capacity)
    assert targets(packed.documents.labels) == targets(docs.labels)


@given(st.lists(st.integers(2, 32), min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_documents_in_are_documents_out(lens: list[int]) -> None:
    docs = documents([(length, 0) for length in lens])
    packed = pack(docs, whole(docs), 32, packing=True)
    check(packed, 32)
    out = np.split(packed.documents.input_ids, np.cumsum(packed.documents.lens)[:-1])
    before = np.split(docs.input_ids, np.cumsum(docs.lens)[:-1])
    assert sorted(map(tuple, out)) == sorted(map(tuple, before))


def test_cut_pieces_overlap_by_the_token_that_predicts() -> None:
    docs = documents([(20, 0), (20, 19), (8, 2)])
    pieces = cut(docs, 8)
    assert [(int(s), int(n)) for s, n in zip(pieces.starts, pieces.lens, strict=True)] == [
        (0, 8),
        (7, 8),
        (14, 6),
        (34, 6),  # the pieces before hold only the prompt of the second document
        (40, 8),
    ]


def test_rows_are_nearly_full() -> None:
    rng = np.random.default_rng(0)
    lens = np.clip(rng.lognormal(5.0, 1.0, 5000).astype(np.int64), 2, 2048)
    rows, num_rows = best_fit(lens, 2048)
    filled = np.bincount(rows, weights=lens)
    assert len(filled) == num_rows and filled.max() <= 2048
    assert lens.sum() / (num_rows * 2048) > 0.995


def test_best_fit_takes_the_fullest_row() -> None:
    rows, num_rows = best_fit(np.array([6, 7, 3, 4]), 10)
    assert num_rows == 2
    assert rows[1] == rows[2] and rows[0] == rows[3]


@pytest.mark.parametrize("packing", [True, False])
def test_nothing_to_pack(packing: bool) -> None:
    docs = documents([])
    packed = pack(docs, whole(docs), 16, packing=packing)
    assert len(packed.docs_per_row) == 0


@given(st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=4), min_size=1, max_size=30), st.booleans())
@settings(max_examples=150, deadline=None)
def test_groups_stay_whole_and_in_order(groups: list[list[int]], packing: bool) -> None:
    docs = documents([(length, 0) for group in groups for length in group])
    sizes = np.array([len(group) for group in groups])
    packed = pack(docs, whole(docs), 48, packing=packing, groups=sizes)
    check(packed, 48)
    out = np.split(packed.documents.input_ids, np.cumsum(packed.documents.lens)[:-1])
    rows = np.repeat(np.arange(len(packed.docs_per_row)), packed.docs_per_row)
    place = {int(document[0]): number for number, document in enumerate(out)}
    firsts = np.cumsum(docs.lens) - docs.lens
    before = np.split(docs.input_ids, firsts[1:])
    assert sorted(map(tuple, out)) == sorted(map(tuple, before))
    for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        places = [place[int(first)] for first in firsts[start : start + size]]
        assert places == list(range(places[0], places[0] + size)), "next to each other, in their order"
        assert len({int(rows[number]) for number in places}) == 1, "in one row"
    if not packing:
        assert np.array_equal(packed.docs_per_row, sizes)


def test_a_group_that_does_not_fit_is_refused() -> None:
    docs = documents([(10, 0), (10, 0)])
    with pytest.raises(ValueError, match="a group of 20 tokens does not fit a row of 16"):
        pack(docs, whole(docs), 16, packing=True, groups=np.array([2]))
