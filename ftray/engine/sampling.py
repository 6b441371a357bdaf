"""The next token of every row at once, each row by its own settings and its own random stream."""

import random
from collections.abc import Sequence

import torch

from ftray.engine.api import Sampling

_MIN_TEMPERATURE = 1e-5
"""Below it only the most likely token has a chance, and dividing by it may leave the range of a float."""


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
    warm = [row for row, draw in enumerate(draws) if draw.sampling.temperature >= _MIN_TEMPERATURE]
    # A row goes one way or the other by its own settings alone, so its draws do not depend on the others.
    for rows, choose in (
        ([row for row in warm if draws[row].sampling.top_p == 1.0], _from_all),
        ([row for row in warm if draws[row].sampling.top_p < 1.0], _from_nucleus),
    ):
        if rows:
            for row, token in zip(rows, choose(logits_RV[rows], [draws[row] for row in rows]), strict=True):
                tokens[row] = token
    # A maximum is NaN if any logit of its row is; single minus infinities are a model's way to ban tokens.
    for row, finite in enumerate(best.values.isfinite().tolist()):
        if not finite:
            tokens[row] = None
    return tokens


def _from_all(logits_RV: torch.Tensor, draws: Sequence[Draws]) -> list[int]:
    return _drawn(_probabilities(logits_RV, draws), draws).tolist()


def _from_nucleus(logits_RV: torch.Tensor, draws: Sequence[Draws]) -> list[int]:
    """From the smallest set of likely tokens that reaches `top_p` (Holtzman et al., arXiv:1904.09751)."""
    top_p = torch.tensor([draw.sampling.top_p for draw in draws], device=logits_RV.device)
    sorted_RV, order_RV = _probabilities(logits_RV, draws).sort(dim=-1, descending=True, stable=True)
    outside_RV = sorted_RV.cumsum(dim=-1) - sorted_RV >= top_p[:, None]
    outside_RV[:, 0] = False
    place_R = _drawn(sorted_RV.masked_fill(outside_RV, 0.0), draws)
    return order_RV.gather(1, place_R[:, None])[:, 0].tolist()


def _probabilities(logits_RV: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    temperature = torch.tensor([draw.sampling.temperature for draw in draws], device=logits_RV.device)
    # Subtracting the maximum first keeps a small temperature from overflowing.
    shifted_RV = logits_RV - logits_RV.max(dim=-1, keepdim=True).values
    return torch.softmax(shifted_RV / temperature[:, None], dim=-1).double()


def _drawn(weights_RV: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    """Places `[rows]` drawn in proportion to non-negative weights, by inverse-transform sampling."""
    uniform = torch.tensor([draw.next() for draw in draws], device=weights_RV.device, dtype=torch.float64)
    cumulative_RV = weights_RV.cumsum(dim=-1)
    total_R1 = cumulative_RV[:, -1:].contiguous()
    # Rounding may take the product up to the total, which no place lies beyond.
    target_R1 = torch.minimum(uniform[:, None] * total_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    return torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
