"""Documents longer than a row: each policy, with what it keeps and what it counts."""

import numpy as np
import pytest

from ftray.data.overlong import fit
from ftray.data.read import IGNORE_INDEX
from ftray.data.tokenise import Documents, Tokenised


def tokenised(*masks: str, rows: list[int] | None = None) -> Tokenised:
    """Documents from strings with a `t` for each target and a `.` for each context token."""
    flat = "".join(masks)
    ids = np.arange(len(flat), dtype=np.int32)
    target = np.array([char == "t" for char in flat])
    labels = np.where(target, ids, np.int32(IGNORE_INDEX)).astype(np.int32)
    documents = Documents(ids, labels, target.astype(np.float32), np.array([len(mask) for mask in masks]))
    return Tokenised(documents, [], np.array(rows if rows is not None else range(len(masks))))


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ("..tt", "..tt"),  # fits
        ("......tt", "..tt"),  # only context goes
        (".tttt.tt", ".tt"),  # a reply would be cut: it goes whole
        (".tt..ttt", ".ttt"),  # the reply fills the row
        (".tt.tttt", None),  # the last reply has no room for the token before it
        ("ttttt", None),
        ("..tt....", None),  # what is left holds nothing to learn
    ],
)
def test_truncation_never_eats_a_reply(mask: str, kept: str | None) -> None:
    fitted = fit(tokenised(mask), 4, "truncate_left")
    if kept is None:
        assert fitted.rows == 0 and len(fitted.pieces.lens) == 0 and fitted.truncated == 0
        assert fitted.filtered == {"overlong_reply": 1}
        return
    [start], [length] = fitted.pieces.starts, fitted.pieces.lens
    assert mask[start : start + length] == kept and start + length == len(mask)
    assert (fitted.rows, fitted.truncated, fitted.filtered.total()) == (1, int(kept != mask), 0)


def test_rows_go_with_all_their_documents() -> None:
    found = tokenised("..tt", ".....t", ".t", rows=[0, 0, 1])
    rejected = fit(found, 4, "reject")
    assert rejected.pieces.starts.tolist() == [10]
    assert (rejected.rows, rejected.filtered) == (1, {"overlong": 1})
    split = fit(found, 4, "split")
    assert (split.rows, split.split, split.filtered.total()) == (2, 1, 0)
    truncated = fit(found, 4, "truncate_left")
    assert (truncated.rows, truncated.truncated) == (2, 1)
    assert truncated.pieces.lens.tolist() == [4, 4, 2]
