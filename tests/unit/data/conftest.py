"""Small corpora and a tokenizer for the tests of the data plane."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftray.config.recipe import DataConfig
from ftray.testing.tiny import byte_tokenizer

WriteRows = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return str(folder)


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows (or ready bytes) as a JSON lines file."""

    def write(rows: list[Any] | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        content = rows if isinstance(rows, bytes) else b"".join(json.dumps(r).encode() + b"\n" for r in rows)
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A data section with a cache of its own."""

    def make(train: Path | str, **fields: Any) -> DataConfig:
        defaults = {"cache_dir": str(tmp_path / "cache"), "max_length": 64}
        return DataConfig(train=[str(train)], **{**defaults, **fields})

    return make
