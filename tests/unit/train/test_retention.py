"""Which checkpoints stay."""

from pathlib import Path

import pytest

from ftray.train.retention import pin, pinned, superfluous, unpin


@pytest.mark.parametrize(
    ("keep", "losses", "pins", "goes"),
    [
        (2, {}, (), [2, 4, 6]),
        (5, {}, (), []),
        (1, {}, (4,), [2, 6, 8]),
        (2, {4: 1.0, 8: 2.0}, (), [2, 6]),
        (1, {2: 1.0, 4: 1.0}, (), [4, 6, 8]),  # of two equals the first
        (1, {10: 0.5, 2: 1.0}, (2, 99), [4, 6, 8]),
        (1, {2: float("inf"), 4: 3.0}, (), [2, 6, 8]),
    ],
)
def test_newest_best_and_pinned_stay(
    keep: int, losses: dict[int, float], pins: tuple[int, ...], goes: list[int]
) -> None:
    assert superfluous([10, 2, 8, 4, 6], keep, losses, pins) == goes


def test_pins(tmp_path: Path) -> None:
    assert pinned(tmp_path) == set()
    pin(tmp_path, "journal", 4), pin(tmp_path, "other-run", 8), pin(tmp_path, "journal", 6)
    assert pinned(tmp_path) == {6, 8}
    unpin(tmp_path, "journal"), unpin(tmp_path, "journal")
    assert pinned(tmp_path) == {8}
    (tmp_path / ".pins" / "broken").write_text("?")
    with pytest.raises(ValueError, match="invalid literal"):
        pinned(tmp_path)
