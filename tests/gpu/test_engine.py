"""The engine on a GPU: answers of a mixed batch are PEFT's, in float32 and bfloat16."""

from pathlib import Path

import pytest

from benchmarks.gpu.engine import check
from benchmarks.serve.arms import HuggingFace, our_engine
from benchmarks.serve.setup import Setup


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixed_batch_equals_peft(tmp_path: Path, dtype: str) -> None:
    setup = Setup(tmp_path, dtype, "cuda")
    adapters = setup.adapters("tiny", 3)
    engine = our_engine(setup.base("tiny"), adapters, dtype, device="cuda")
    peer = HuggingFace(setup.base("tiny"), adapters, dtype, "cuda")
    check(engine, peer, setup, list(adapters), 16)
