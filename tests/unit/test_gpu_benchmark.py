"""The GPU benchmark of the engine, tiny and on the CPU: the same functions, and a check that can fail."""

import argparse
from pathlib import Path

import pytest

from benchmarks.gpu.engine import check, compare
from benchmarks.serve.arms import HuggingFace, our_engine
from benchmarks.serve.setup import Setup
from ftray.model.tokenizer import load_tokenizer
from ftray.testing import tiny


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    root = tmp_path_factory.mktemp("setup")
    # In the place of one trained on the standard library, which takes longer than all the rest.
    load_tokenizer(tiny.tiny_base(root / "tiny")).save_pretrained(root / "tokenizer")
    return Setup(root, "float32", "cpu")


def test_both_sides_answer_over_the_base_and_under_adapters(setup: Setup) -> None:
    options = argparse.Namespace(adapters=[1, 2], new_tokens=4, batches=[8, 16], rounds=1)
    figures = compare(setup, "tiny", options)
    assert {"ratio_vs_hf_0", "ratio_vs_hf_1", "ratio_vs_hf_2"} < figures.keys()
    assert figures["worst_logit_gap"] < 1e-3 < figures["worst_logit_gap_of_another_adapter"]


def test_answers_of_another_adapter_are_found_out(setup: Setup) -> None:
    adapters = setup.adapters("tiny", 2)
    first, second = adapters.values()
    swapped: dict[str, Path] = dict(zip(adapters, (second, first), strict=True))
    engine = our_engine(setup.base("tiny"), swapped, "float32", device="cpu")
    peer = HuggingFace(setup.base("tiny"), adapters, "float32")
    with pytest.raises(AssertionError, match="worst_logit_gap"):
        check(engine, peer, setup, list(adapters), 16)
