"""Attention over the paged cache equals attention written out, natively and in plain torch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftray.engine import attend, native, paged
from ftray.engine.api import Request
from ftray.engine.sequence import Row, Sequence

HEADS, KV_HEADS, SIZE, BLOCK = 6, 2, 32, 8
LENGTHS = [1, 7, 8, 9, 16, 17, 40, 150]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 11},
    "softcap": {"softcap": 0.7},
    "sinks": {"s_aux": torch.linspace(-2, 3, HEADS)},
    "all": {"sliding_window": 20, "softcap": 0.9, "s_aux": torch.linspace(-1, 2, HEADS)},
}


@pytest.fixture(params=["native", "padded", "each"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three ways in which single tokens attend."""
    if request.param == "native":
        if not native.available():
            pytest.skip("the native kernels are not built here; `python -m ftray.engine.native` builds them")
        return "native"
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(attend, "_PADDED_CONTEXT", 10**9 if request.param == "padded" else 0)
    return str(request.param)


def written_out(
    q_HD: torch.Tensor, keys_LKD: torch.Tensor, values_LKD: torch.Tensor, scaling: float, **how: Any
) -> torch.Tensor:
    """One query over its own and all earlier keys, in float64."""
    q, keys, values = q_HD.double(), keys_LKD.double(), values_LKD.double()
    window = how.get("sliding_window")
    first = max(0, len(keys) - window) if window else 0
    keys, values = (part[first:].repeat_interleave(HEADS // KV_HEADS, 1) for part in (keys, values))
    scores = torch.einsum("hd,lhd->hl", q, keys) * scaling
    if softcap := how.get("softcap"):
        scores = torch.tanh(scores / softcap) * softcap
    sinks = how.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None]], 1)
    weights = scores.softmax(-1)[:, : len(keys)]
    return torch.einsum("hl,lhd->hd", weights, values)


class Setting:
    """Sequences of several lengths in a cache whose blocks are out of order, and their keys and values."""

    def __init__(self, dtype: torch.dtype, value_size: int = SIZE) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        counts = [-(-length // BLOCK) for length in LENGTHS]
        order = torch.randperm(sum(counts), generator=generator).tolist()
        self.cache = paged.KVCache(sum(counts), BLOCK, len(LENGTHS), max(LENGTHS), torch.device("cpu"))
        self.seqs = []
        for row, (length, count) in enumerate(zip(LENGTHS, counts, strict=True)):
            blocks, order = order[:count], order[count:]
            request = Request(id=str(row), prompt_ids=[0])
            self.seqs.append(Sequence(request, 0, [0] * length, row=row, blocks=blocks))
            self.cache.place(self.seqs[-1])
        self.q = [random(length, HEADS, SIZE) for length in LENGTHS]
        self.k = [random(length, KV_HEADS, SIZE) for length in LENGTHS]
        self.v = [random(length, KV_HEADS, value_size) for length in LENGTHS]

    def run(self, parts: Callable[[int], list[int]], **how: Any) -> list[torch.Tensor]:
        """Attend to every sequence in steps that end at the places named; its outputs, all steps joined."""
        outputs: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
        bounds = [[0, *parts(length), length] for length in LENGTHS]
        for at in range(max(map(len, bounds)) - 1):
            rows = [
                Row(seq, b[at], b[at + 1] - b[at])
                for seq, b in zip(self.seqs, bounds, strict=True)
                if at + 1 < len(b) and b[at + 1] > b[at]
            ]
            for row, output in zip(rows, self._step(rows, how), strict=True):
                outputs[row.seq.row].append(output)
        return [torch.cat(pieces) for pieces in outputs]

    def _step(self, rows: list[Row], how: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        def joined(parts: list[torch.Tensor]) -> torch.Tensor:
            pieces = [parts[row.seq.row][row.start : row.start + row.length] for row in rows]
            return torch.cat(pieces).transpose(0, 1)[None]

        module: Any = SimpleNamespace(layer_idx=0)
        with paged.using(paged.Step(self.cache, rows)):
            arguments = [joined(parts) for parts in (self.q, self.k, self.v)]
            output, _ = paged.paged_attention(module, *arguments, None, scaling=0.2, **how)
        return output[0].split([row.length for row in rows])

    def check(self, outputs: list[torch.Tensor], **how: Any) -> None:
        for q, k, v, output in zip(self.q, self.k, self.v, outputs, strict=True):
            expected = torch.stack(
                [written_out(q[at], k[: at + 1], v[: at + 1], 0.2, **how) for at in range(len(q))]
            )
            assert (output.double() - expected).abs().max() <= TOLERANCE[output.dtype] * max(
                1.0, float(expected.abs().max())
            )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("way", WAYS)
def test_prompts_in_parts_and_single_tokens_equal_attention_written_out(
    kernels: str, way: str, dtype: torch.dtype
) -> None:
    setting = Setting(dtype)
    # A prompt whole, one in two parts, and the last two tokens of each alone, while others are elsewhere.
    outputs = setting.run(lambda n: sorted({max(1, n // 2), max(1, n - 2), max(1, n - 1)} - {n}), **WAYS[way])
    setting.check(outputs, **WAYS[way])


def test_values_may_have_another_size_than_keys(kernels: str) -> None:
    setting = Setting(torch.float32, value_size=80)
    setting.check(setting.run(lambda n: [n - 1] if n > 1 else []))


def test_sizes_that_the_kernel_is_not_made_for_go_the_other_way() -> None:
    setting = Setting(torch.float32, value_size=20)
    setting.check(setting.run(lambda n: [n - 1] if n > 1 else []))
    assert not setting.cache._layers[0].native


def test_several_threads_give_what_one_gives(kernels: str) -> None:
    setting = Setting(torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        setting.check(setting.run(lambda n: [n - 1] if n > 1 else []))
    finally:
        torch.set_num_threads(before)
