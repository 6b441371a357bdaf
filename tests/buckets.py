"""Buckets of an S3 server on the loopback, found as users let them be found: by the environment."""

import contextlib
from collections.abc import Iterator

import pytest
import s3fs


@contextlib.contextmanager
def empty_bucket(endpoint: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """A new bucket of a server; it goes with all that is in it."""
    for variable, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem(use_listings_cache=False)
    system.mkdir(name)
    yield system
    system.rm(name, recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
