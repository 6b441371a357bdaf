"""What a worker group's end is told as: a user's mistake, or a fault that another attempt may not meet."""

from pathlib import Path

import pytest

from ftray.core.errors import DataError, GroupFailed
from ftray.core.fs import write_json
from ftray.train.ray_group import MISTAKE, _fit, write_error
from ftray.train.stop import Stop


class Dies:
    """A trainer whose group has died too often."""

    def fit(self) -> None:
        """Ends as Ray Train's own does."""
        raise RuntimeError("2 workers are gone\nthe actor died: its node has been lost")


def test_a_fault_of_a_machine_is_no_mistake(tmp_path: Path) -> None:
    """Nor is a rank that hangs; what a worker wrote down is, and is of its own type."""
    stop = Stop(tmp_path)
    try:
        with pytest.raises(
            GroupFailed, match=r"^the worker group failed: the actor died: its node has been lost$"
        ):
            _fit(Dies(), tmp_path, stop)
        (tmp_path / "stacks").mkdir()
        write_json(tmp_path / "stacks" / "hung-0.json", {"what": "rank 0 made no progress", "time": 1.0})
        with pytest.raises(GroupFailed, match=r"^rank 0 made no progress; "):
            _fit(Dies(), tmp_path, stop)
        write_error(tmp_path / MISTAKE, DataError("rows: none"))
        with pytest.raises(DataError, match=r"^rows: none$"):
            _fit(Dies(), tmp_path, stop)
    finally:
        stop.close()
