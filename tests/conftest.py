"""Fixtures every kind of test shares."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["tests.recipes"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors: threads that spin for each other cost more than they bring, and Ray workers have one anyway.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a byte-level tokenizer and a chat template."""
    from ftray.testing import tiny

    return tiny.tiny_base(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two PEFT-made LoRA folders of different rank on `tiny_base`."""
    from ftray.testing import tiny

    root = tmp_path_factory.mktemp("adapters")
    return {
        "a": tiny.random_adapter(tiny_base, root / "a", r=4, seed=1),
        "b": tiny.random_adapter(tiny_base, root / "b", r=8, seed=2),
    }
