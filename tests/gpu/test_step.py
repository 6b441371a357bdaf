"""A whole step on a GPU, full and LoRA: compiled, checkpointed, and against transformers; the loss alone."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.gpu.loops import hugging_face, ours
from benchmarks.gpu.shapes import row
from ftray.objective.chunked_nll import ChunkedNLL

TOKENS = 256


def losses(device: str, *, lora: bool, compiled: bool = False, checkpointing: bool = False) -> list[float]:
    """Losses of three steps of our loop on one row."""
    _, step = ours("tiny", lora=lora, device=device, compiled=compiled, checkpointing=checkpointing)
    return [step(row("tiny", TOKENS, 0, device)) for _ in range(3)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("compiled", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_compiling_and_checkpointing_change_no_loss(lora: bool, compiled: bool, checkpointing: bool) -> None:
    found = losses("cuda", lora=lora, compiled=compiled, checkpointing=checkpointing)
    plain = losses("cuda", lora=lora)
    assert found == pytest.approx(plain, abs=0.02)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_equals_transformers(lora: bool) -> None:
    batch = row("tiny", TOKENS, 0, "cuda")
    _, theirs = hugging_face("tiny", lora=lora, device="cuda", compiled=False, checkpointing=False)
    _, mine = ours("tiny", lora=lora, device="cuda", compiled=False, checkpointing=False)
    assert mine(batch) == pytest.approx(theirs(batch), abs=0.02)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_chunked_cross_entropy(bf16: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 64, generator=generator)
    head = torch.randn(997, 64, generator=generator)
    labels = torch.randint(0, 997, (700,), generator=generator)
    weights = torch.rand(700, generator=generator)

    def run(place: Callable[[torch.Tensor], torch.Tensor], device: str, cast: bool) -> list[torch.Tensor]:
        leaves = [place(tensor).detach().requires_grad_() for tensor in (hidden, head)]
        with torch.autocast(device, torch.bfloat16, enabled=cast):
            (loss,) = ChunkedNLL.apply(*leaves, labels.to(device), place(weights), [len(labels)])
        loss.backward()
        return [
            loss.detach().cpu().double(),
            *(leaf.grad.cpu().double() for leaf in leaves if leaf.grad is not None),
        ]

    expected = run(lambda tensor: tensor.double(), "cpu", False)
    found = run(lambda tensor: tensor.cuda(), "cuda", bf16)
    for one, two in zip(found, expected, strict=True):
        assert float((one - two).norm() / two.norm()) < (0.01 if bf16 else 1e-4)
