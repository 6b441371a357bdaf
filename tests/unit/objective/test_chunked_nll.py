"""The chunked cross-entropy kernel against plain cross-entropy in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
@pytest.mark.parametrize("bf16", [False, True])
def test_adds_to_the_gradient_that_the_head_has(
    chunk_bytes: int, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_nll, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(chunked_nll, "_HEAD_ROWS", 100)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    gradients = []
    for _ in range(2):
        # The head is the embedding too, as in models that tie them: two gradients meet.
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            tied = F.embedding(labels, head).sum()
            (ChunkedNLL.apply(hidden, head, labels, torch.ones(TOKENS), [TOKENS])[0] / 3 + tied).backward()
        assert head.grad is not None
        gradients.append(head.grad.clone())
    torch.testing.assert_close(gradients[1], 2 * gradients[0], rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that operations make; what shares memory with `known` is left out."""

    def __init__(self, *known: torch.Tensor | None) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known if tensor is not None}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.elements = max(self.elements, out.numel())
        return out


def test_adding_makes_no_tensor_of_the_heads_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_nll, "_HEAD_ROWS", 100)
    head = torch.ones(VOCABULARY, WIDTH, requires_grad=True)
    hidden, labels = torch.ones(4, WIDTH), torch.zeros(4, dtype=torch.long)
    found = []
    for _ in range(2):
        (loss,) = ChunkedNLL.apply(hidden, head, labels, torch.ones(4), [4])
        with Largest(head, head.grad) as largest:
            loss.backward()
        found.append(largest.elements)
    assert found[0] == head.numel() and found[1] < head.numel() / 2, found
