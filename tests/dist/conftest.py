"""The processes of the ranks, which these tests share."""

from collections.abc import Iterator

import pytest

from ftray.testing.ranks import end_ranks


@pytest.fixture(scope="package", autouse=True)
def ranks() -> Iterator[None]:
    """They end with the last test here."""
    yield
    end_ranks()
