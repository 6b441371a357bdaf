"""Everything here needs a GPU."""

import pytest
import torch

NO_GPU = "no CUDA device; the same functions run on the CPU in tests/unit/model"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
