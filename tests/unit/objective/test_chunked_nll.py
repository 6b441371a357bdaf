"""The chunked cross-entropy kernel against plain cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from ftray.objective import chunked_nll
from ftray.objective.chunked_nll import ChunkedNLL

TOKENS, WIDTH, VOCABULARY = 700, 16, 997


def run(dtype: torch.dtype, bf16: bool = False, train_head: bool = True) -> dict[str, torch.Tensor]:
    """Loss and gradients of the kernel, and of cross-entropy in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_(train_head)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        (loss,) = ChunkedNLL.apply(hidden, head, labels, weights, [TOKENS])
    (loss / 7).backward()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_head = head.detach().double().requires_grad_()
    nll = F.cross_entropy(exact_hidden @ exact_head.T, labels, reduction="none")
    exact = (nll * weights.double()).sum()
    (exact / 7).backward()
    return {
        "loss": loss.detach(),
        "hidden": hidden.grad,
        "head": head.grad,
        "exact_loss": exact.detach(),
        "exact_hidden": exact_hidden.grad,
        "exact_head": exact_head.grad,
    }


@pytest.mark.parametrize("chunk_bytes", [1, 300 * VOCABULARY * 4, 1 << 30])
@pytest.mark.parametrize("strip", [1, 1 << 13])
def test_equals_cross_entropy(chunk_bytes: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_nll, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(chunked_nll, "_STRIP_ELEMENTS", strip)
    found = run(torch.float32)
    for name in ("loss", "hidden", "head"):
        torch.testing.assert_close(found[name].double(), found[f"exact_{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_and_no_more(dtype: torch.dtype) -> None:
    found = run(dtype, bf16=True)
    for name in ("loss", "hidden", "head"):
        exact = found[f"exact_{name}"]
        assert float((found[name].double() - exact).norm() / exact.norm()) < 0.01, name
    # One factor wrong by a rounding of bfloat16 would stretch the whole gradient.
    stretch = float(
        (found["hidden"].double() * found["exact_hidden"]).sum() / found["exact_hidden"].square().sum()
    )
    assert stretch == pytest.approx(1, abs=5e-4)


def test_frozen_head_and_no_targets() -> None:
    assert run(torch.float32, train_head=False)["head"] is None
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    head = torch.ones(VOCABULARY, WIDTH, requires_grad=True)
    (loss,) = ChunkedNLL.apply(hidden, head, torch.zeros(0, dtype=torch.long), torch.zeros(0), [0])
    loss.backward()
    assert float(loss.detach()) == 0
    assert head.grad is not None and not head.grad.any()
