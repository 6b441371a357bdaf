"""Where the documents of a padding-free row begin and end, as attention needs to know it."""

import weakref
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class RowFacts:
    """What every layer asks of a row's document bounds; found once, since each question waits for the device."""

    def __init__(self, bounds: torch.Tensor) -> None:
        self.lengths: list[int] = bounds.diff().tolist()
        self.longest = max(self.lengths, default=0)
        self._bounds = weakref.ref(bounds)
        self._masks: dict[int | None, BlockMask] = {}

    def is_of(self, bounds: torch.Tensor) -> bool:
        """True if these are the facts of this very tensor."""
        return self._bounds() is bounds

    def mask(self, window: int | None) -> BlockMask:
        """Which keys a query sees, for FlexAttention."""
        if window not in self._masks:
            lengths = torch.tensor(self.lengths)
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            bounds = self._bounds()
            assert bounds is not None
            owner = owner.to(bounds.device)

            def sees(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                seen = (owner[query] == owner[key]) & (query >= key)
                return seen if window is None else seen & (query - key < window)

            total = len(owner)
            self._masks[window] = create_block_mask(sees, None, None, total, total, device=str(owner.device))
        return self._masks[window]


_newest: list[RowFacts] = []


def facts(bounds: torch.Tensor) -> RowFacts:
    """Facts of a row; kept until another row is asked for, so all layers of a forward pass share them."""
    if not _newest or not _newest[0].is_of(bounds):
        _newest[:] = [RowFacts(bounds)]
    return _newest[0]
