"""The next token of every row at once, each row by its own settings and its own random stream."""

import random
from collections.abc import Sequence

import torch

from ftray.engine.api import Sampling


class Draws:
    """A request's stream of uniform numbers: it depends on its seed alone, not on the rest of the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = random.Random(sampling.seed)

    def next(self) -> float:
        """A number in [0, 1); one is used per sampled token."""
        return self._random.random()


def sample(logits_RV: torch.Tensor, draws: Sequence[Draws]) -> list[int | None]:
    """Choose a token for each row.

    Args:
        logits_RV: logits `[rows, vocabulary]`, any float type.
        draws: the settings and random stream of each row.

    Returns:
        A token per row, or None where the row's logits are not finite.
    """
    logits_RV = logits_RV.float()
    best = logits_RV.max(dim=-1)
    tokens: list[int | None] = best.indices.tolist()
    warm = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if warm:
        chosen = _nucleus(logits_RV[warm], [draws[row] for row in warm])
        for row, token in zip(warm, chosen, strict=True):
            tokens[row] = token
    # A maximum is NaN if any logit of its row is; single minus infinities are a model's way to ban tokens.
    for row, finite in enumerate(best.values.isfinite().tolist()):
        if not finite:
            tokens[row] = None
    return tokens


def _nucleus(logits_RV: torch.Tensor, draws: Sequence[Draws]) -> list[int]:
    """Inverse-transform sampling from the sorted head (Holtzman et al., arXiv:1904.09751)."""
    device = logits_RV.device
    temperature = torch.tensor([draw.sampling.temperature for draw in draws], device=device)
    top_p = torch.tensor([draw.sampling.top_p for draw in draws], device=device)
    uniform = torch.tensor([draw.next() for draw in draws], device=device, dtype=torch.float64)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    shifted_RV = logits_RV - logits_RV.max(dim=-1, keepdim=True).values
    sorted_RV, order_RV = torch.softmax(shifted_RV / temperature[:, None], dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    cumulative_RV = sorted_RV.double().cumsum(dim=-1)
    outside_RV = cumulative_RV - sorted_RV >= top_p[:, None]
    outside_RV[:, 0] = False
    kept_RV = sorted_RV.double().masked_fill(outside_RV, 0.0).cumsum(dim=-1)
    place_R = torch.searchsorted(kept_RV, (uniform * kept_RV[:, -1])[:, None], right=True)[:, 0]
    last_R = (~outside_RV).sum(dim=-1) - 1
    return order_RV.gather(1, torch.minimum(place_R, last_R)[:, None])[:, 0].tolist()
