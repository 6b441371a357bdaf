"""What an engine says of a delta that it does not take."""

from pathlib import Path

import pytest

from ftray.core.errors import DeltaError
from ftray.engine.core import StepEngine


def refused(engine: StepEngine, folder: Path) -> str:
    """The one line; nothing of the delta is left."""
    with pytest.raises(DeltaError) as caught:
        engine.load_delta("x", str(folder))
    assert engine.deltas() == []
    assert "\n" not in str(caught.value)
    return str(caught.value)
