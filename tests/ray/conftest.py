"""One small Ray cluster per test module."""

from collections.abc import Iterator

import pytest

from ftray.cluster.ray_session import session


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A private local cluster with two CPUs, gone when the module's tests are."""
    with session(address="local", num_cpus=2):
        yield
