"""Attention in blocks against exact attention document by document, and against torch's own bfloat16 kernel."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from ftray.model.attend_cpu import BLOCK, BlockAttention
from ftray.model.attention import packed_attention

DIM = 24


def inputs(lengths: list[int], heads: int, key_heads: int, sharpness: float) -> list[torch.Tensor]:
    """Queries, keys, values and an output gradient in bfloat16, `[heads, tokens, DIM]` each."""
    generator = torch.Generator().manual_seed(len(lengths) + heads)
    scales = ((heads, sharpness), (key_heads, 1.0), (key_heads, 1.0), (heads, 1.0))
    shapes = [(torch.randn(h, sum(lengths), DIM, generator=generator) * scale) for h, scale in scales]
    return [tensor.bfloat16() for tensor in shapes]


def by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None
) -> torch.Tensor:
    """SDPA one document at a time, `[tokens, heads, DIM]`, in the type of the inputs."""
    outputs = []
    for start, stop in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        mask = (distance >= 0) & (distance < (window or stop))
        part = [tensor[None, :, start:stop] for tensor in (q, k, v)]
        outputs.append(F.scaled_dot_product_attention(*part, attn_mask=mask, enable_gqa=True)[0])
    return torch.cat(outputs, 1).transpose(0, 1)


def ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None
) -> torch.Tensor:
    result: torch.Tensor = BlockAttention.apply(q, k, v, lengths, DIM**-0.5, window)
    return result


def run(function: object, tensors: list[torch.Tensor], *args: object) -> list[torch.Tensor]:
    """Output, then the gradients of queries, keys and values."""
    *leaves, grad = tensors
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    output = function(*leaves, *args)  # type: ignore[operator]
    output.backward(grad.transpose(0, 1))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [None, 40])
def test_as_exact_as_torch_in_bfloat16(
    sharpness: float, heads: int, key_heads: int, window: int | None
) -> None:
    """Also where scores are in the hundreds, whose rounding to bfloat16 would change weights many times over."""
    lengths = [1, 7, BLOCK, 2 * BLOCK + 33]
    tensors = inputs(lengths, heads, key_heads, sharpness)
    exact = run(by_document, [tensor.double() for tensor in tensors], lengths, window)
    mine = error(run(ours, tensors, lengths, window), exact)
    torchs = error(run(by_document, tensors, lengths, window), exact)
    for found, usual in zip(mine, torchs, strict=True):
        assert found < max(2 * usual, 0.006), (mine, torchs)


def test_documents_do_not_see_each_other() -> None:
    lengths = [50, 200, 31]
    tensors = inputs(lengths, 4, 2, 1.0)
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[:, 50:250] = 3.0
    before, after = run(ours, tensors, lengths, None), run(ours, changed, lengths, None)
    for one, two in zip(before, [after[0], *after[1:]], strict=True):
        axis = 0 if one.shape[0] == sum(lengths) else 1
        kept = [torch.cat([t.narrow(axis, 0, 50), t.narrow(axis, 250, 31)], axis) for t in (one, two)]
        assert torch.equal(*kept)


def test_same_inputs_give_the_same_bits() -> None:
    tensors = inputs([300, 20], 4, 2, 1.0)
    first, second = run(ours, tensors, [300, 20], None), run(ours, tensors, [300, 20], None)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_autocast_takes_this_path_and_float32_stays_exact() -> None:
    lengths = [40, 90]
    q, k, v, _ = (tensor.float() for tensor in inputs(lengths, 4, 2, 1.0))
    bounds = torch.tensor([0, 40, 130], dtype=torch.int32)

    def attention() -> torch.Tensor:
        module = torch.nn.Module()
        return packed_attention(module, q[None], k[None], v[None], None, cu_seq_lens_q=bounds)[0][0]

    exact = by_document(q, k, v, lengths, None)
    torch.testing.assert_close(attention(), exact, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention()
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, ours(q.bfloat16(), k.bfloat16(), v.bfloat16(), lengths, None))
