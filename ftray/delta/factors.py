"""Low-rank factors: joined exactly, found by singular value decomposition, with the error that this makes.

Shapes: A is `[*stack, r, in]`, B is `[*stack, out, r]`, a change is `[*stack, out, in]`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

Pair = tuple[torch.Tensor, torch.Tensor]
"""A and B; the change is `B @ A`."""
_EXACT_UP_TO = 1024
"""Smaller side up to which a change is decomposed exactly."""
_OVERSAMPLE, _POWER_STEPS = 32, 6


def join(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Factors of a weighted sum: ranks add up, nothing is lost."""
    a = torch.cat([pair[0].float() for pair in pairs], dim=-2)
    b = torch.cat([pair[1].float() * weight for pair, weight in zip(pairs, weights, strict=True)], dim=-1)
    return a, b


def pad(pair: Pair, rank: int) -> Pair:
    """The same change with factors of a higher rank, for readers that know one rank for all layers."""
    missing = rank - pair[0].shape[-2]
    return F.pad(pair[0], (0, 0, 0, missing)), F.pad(pair[1], (0, missing))


def truncate(pair: Pair, rank: int) -> Pair:
    """The best factors of a lower rank for the change of others, without making the change."""
    if pair[0].shape[-2] <= rank:
        return pair
    q_b, r_b = torch.linalg.qr(pair[1])
    q_a, r_a = torch.linalg.qr(pair[0].mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    a, b = _balanced(u, s, vh, rank)
    return a @ q_a.mT, q_b @ b


def factorise(change: torch.Tensor, rank: int) -> Pair:
    """The best factors of a rank for a change; near the best ones where it is large (arXiv:0909.4061)."""
    rank = min(rank, *change.shape[-2:])
    if min(change.shape[-2:]) <= max(_EXACT_UP_TO, 4 * rank):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        return _balanced(u, s, vh, rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(change, q=rank + _OVERSAMPLE, niter=_POWER_STEPS)
    return _balanced(u, s, v.mT, rank)


def _balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> Pair:
    root = s[..., :rank].sqrt()
    return root.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)


class Errors:
    """How far a result is from what it stands for, tensor by tensor (Frobenius norm, relative)."""

    def __init__(self) -> None:
        self.by_tensor: dict[str, float] = {}
        self._missed, self._wanted = 0.0, 0.0

    def add(self, name: str, missed: torch.Tensor, wanted: torch.Tensor) -> None:
        """Note one tensor: what is missing of its change, and its change."""
        missed_squared, wanted_squared = (float(part.double().square().sum()) for part in (missed, wanted))
        self._missed += missed_squared
        self._wanted += wanted_squared
        if wanted_squared:
            self.by_tensor[name] = (missed_squared / wanted_squared) ** 0.5

    @property
    def overall(self) -> float:
        """Of all tensors together."""
        return (self._missed / self._wanted) ** 0.5 if self._wanted else 0.0
