"""Packed attention on a GPU, flash and flex, against exact attention document by document on the CPU."""

import pytest
import torch

from ftray.model import attend_cuda
from ftray.model.attention import attend, packed_attention

LENGTHS = [1, 17, 128, 300, 66]
DIM = 64


def inputs(heads: int, key_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values `[1, heads, tokens, DIM]`, and an output gradient `[1, tokens, heads, DIM]`."""
    generator = torch.Generator().manual_seed(heads)
    shapes = [(1, count, sum(LENGTHS), DIM) for count in (heads, key_heads, key_heads)]
    shapes.append((1, sum(LENGTHS), heads, DIM))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def exact(
    tensors: list[torch.Tensor], window: int | None, softcap: float | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients in float64."""
    *leaves, grad = [tensor.double() for tensor in tensors]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    parts = zip(*(leaf[0].split(LENGTHS, 1) for leaf in leaves), strict=True)
    scaling = DIM**-0.5
    done = [attend(*part, scaling=scaling, window=window, softcap=softcap) for part in parts]
    output = torch.cat(done, 1).transpose(0, 1)[None]
    output.backward(grad)
    return output.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("dtype", "softcap", "tolerance"),
    [(torch.bfloat16, None, 0.01), (torch.bfloat16, 20.0, 0.01), (torch.float32, None, 1e-3)],
    ids=["flash", "flex-softcap", "flex-float32"],
)
def test_equals_attention_by_document(
    heads: int,
    key_heads: int,
    window: int | None,
    dtype: torch.dtype,
    softcap: float | None,
    tolerance: float,
) -> None:
    tensors = inputs(heads, key_heads, dtype)
    expected, gradients = exact(tensors, window, softcap)
    *leaves, grad = [tensor.cuda() for tensor in tensors]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert attend_cuda.takes_flash(leaves[0], softcap) == (dtype == torch.bfloat16 and softcap is None)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    module = torch.nn.Module()
    output, _ = packed_attention(
        module, *leaves, None, cu_seq_lens_q=bounds, sliding_window=window, softcap=softcap
    )
    output.backward(grad)
    pairs = [(output.detach(), expected), *zip((leaf.grad for leaf in leaves), gradients, strict=True)]
    for found, known in pairs:
        assert found is not None
        assert float((found.cpu().double() - known).norm() / known.norm()) < tolerance


def test_one_document_does_not_change_another() -> None:
    q, k, v, _ = [tensor.cuda() for tensor in inputs(8, 2, torch.bfloat16)]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    module = torch.nn.Module()
    before = packed_attention(module, q, k, v, None, cu_seq_lens_q=bounds)[0]
    for tensor in (q, k, v):
        tensor[:, :, 18:146] += 5
    after = packed_attention(module, q, k, v, None, cu_seq_lens_q=bounds)[0]
    assert torch.equal(before[:, :18], after[:, :18]) and torch.equal(before[:, 146:], after[:, 146:])
    assert not torch.equal(before[:, 18:146], after[:, 18:146])
