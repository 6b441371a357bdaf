"""Facts of a row's documents, and FlexAttention's path, whose mask needs no GPU."""

import pytest
import torch

from ftray.model import attend_cuda
from ftray.model.attention import attend
from ftray.model.documents import facts

LENGTHS = [5, 1, 130, 40]


def test_facts_are_kept_for_one_tensor_and_no_other() -> None:
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
    first = facts(bounds)
    assert (first.lengths, first.longest) == ([3, 7], 7)
    assert facts(bounds) is first
    assert facts(torch.tensor([0, 4], dtype=torch.int32)).lengths == [4]
    assert facts(bounds).lengths == [3, 7]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flex_attention_equals_attention_by_document(window: int | None, softcap: float | None) -> None:
    """Forward only: FlexAttention has no backward on a CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, sum(LENGTHS), 16, generator=generator) for heads in (4, 2, 2))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with torch.no_grad():
        found = attend_cuda.attend(q, k, v, bounds, scaling=0.25, window=window, softcap=softcap)
    parts = zip(q.split(LENGTHS, 1), k.split(LENGTHS, 1), v.split(LENGTHS, 1), strict=True)
    expected = torch.cat([attend(*part, scaling=0.25, window=window, softcap=softcap) for part in parts], 1)
    torch.testing.assert_close(found, expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_flash_takes_what_its_kernel_computes() -> None:
    half = torch.empty(1, 1, 64, dtype=torch.bfloat16)
    assert attend_cuda.takes_flash(half, None)
    assert not attend_cuda.takes_flash(half, 30.0)
    assert not attend_cuda.takes_flash(half.float(), None)
    assert not attend_cuda.takes_flash(torch.empty(1, 1, 512, dtype=torch.bfloat16), None)
