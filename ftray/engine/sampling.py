"""The next token of every row at once, each row by its own settings and its own random stream.

The order is transformers': penalties, temperature, top-k, top-p, min-p. What is done to a row depends on its own
settings alone, so its tokens are the same in any company.
"""

import hashlib
import secrets
from collections.abc import Collection, Sequence

import torch

from ftray.engine.request import Sampling

_MIN_TEMPERATURE = 1e-5
"""Below it only the most likely token has a chance, and dividing by it may leave the range of a float."""
_FIRST_LOOK = 1024
"""Most likely tokens sorted at first where the cut is not known; the whole vocabulary only if it lies beyond."""


class Draws:
    """How one answer's tokens are chosen: its settings, its random stream, and the tokens it has.

    The stream is counter-based: the number for the i-th token is a hash of (seed, index, i).

    Args:
        sampling: the settings.
        tokens: prompt and answer; the engine appends to it.
        num_prompt: how many of them are the prompt's.
        index: which of the request's answers.
        ends: tokens that end an answer.
    """

    def __init__(
        self,
        sampling: Sampling,
        tokens: Sequence[int] = (),
        num_prompt: int = 0,
        index: int = 0,
        ends: Collection[int] = (),
    ) -> None:
        self.sampling = sampling
        self.penalised = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        ) != (1.0, 0.0, 0.0)
        self._tokens, self._num_prompt, self._ends = tokens, num_prompt, sorted(ends)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._key = f"{seed}:{index}:".encode()
        self._count = 0
        self._seen_V: torch.Tensor | None = None
        self._counts_V: torch.Tensor | None = None
        self._num_noted = 0

    def next(self) -> float:
        """A number in [0, 1); one is used per sampled token."""
        digest = hashlib.blake2b(self._key + b"%d" % self._count, digest_size=8).digest()
        self._count += 1
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def banned(self) -> list[int]:
        """Tokens it may not have yet."""
        short = len(self._tokens) - self._num_prompt < self.sampling.min_tokens
        return self._ends if short else []

    def history(self, vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that prompt and answer have, bool `[V]`, and how often the answer has each, float `[V]`."""
        if self._seen_V is None or self._counts_V is None:
            self._seen_V = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._counts_V = torch.zeros(vocabulary, device=device)
        if fresh := list(self._tokens[self._num_noted :]):
            self._seen_V[torch.tensor(fresh, device=device)] = True
            if answer := fresh[max(0, self._num_prompt - self._num_noted) :]:
                ones = torch.ones(len(answer), device=device)
                self._counts_V.index_add_(0, torch.tensor(answer, device=device), ones)
            self._num_noted += len(fresh)
        return self._seen_V, self._counts_V


def sample(logits_RV: torch.Tensor, draws: Sequence[Draws]) -> list[int | None]:
    """Choose a token for each row.

    Args:
        logits_RV: logits `[rows, vocabulary]`, any float type; they stay as they are.
        draws: the settings and random stream of each row.

    Returns:
        A token per row, or None where the row's logits are not finite.
    """
    logits_RV = _adjusted(logits_RV.float(), draws)
    best = logits_RV.max(dim=-1)
    tokens: list[int | None] = best.indices.tolist()
    ways: dict[int, list[int]] = {}
    for row, draw in enumerate(draws):
        if draw.sampling.temperature >= _MIN_TEMPERATURE:
            ways.setdefault(_width(draw.sampling, logits_RV.shape[1]), []).append(row)
    for width, rows in ways.items():
        chosen = _choose(logits_RV[rows], [draws[row] for row in rows], width)
        for row, token in zip(rows, chosen, strict=True):
            tokens[row] = token
    # A maximum is NaN if any logit of its row is; single minus infinities are a model's way to ban tokens.
    for row, finite in enumerate(best.values.isfinite().tolist()):
        if not finite:
            tokens[row] = None
    return tokens


def _adjusted(logits_RV: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    """Logits after penalties and bans; the same tensor if there are none."""
    penalised = [row for row, draw in enumerate(draws) if draw.penalised]
    # A stop token may be any number, and a model's own ends may be its tokenizer's alone.
    tokens = range(logits_RV.shape[1])
    banned = [(row, token) for row, draw in enumerate(draws) for token in draw.banned() if token in tokens]
    if not penalised and not banned:
        return logits_RV
    logits_RV = logits_RV.clone()
    if penalised:
        logits_RV[penalised] = _penalised(logits_RV[penalised], [draws[row] for row in penalised])
    if banned:
        rows, columns = zip(*banned, strict=True)
        logits_RV[list(rows), list(columns)] = -float("inf")
    return logits_RV


def _penalised(logits_RV: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    histories = [draw.history(logits_RV.shape[1], logits_RV.device) for draw in draws]
    seen_RV, counts_RV = (torch.stack(parts) for parts in zip(*histories, strict=True))

    def column(name: str) -> torch.Tensor:
        values = [getattr(draw.sampling, name) for draw in draws]
        return torch.tensor(values, device=logits_RV.device)[:, None]

    repetition = column("repetition_penalty")
    repeated_RV = torch.where(logits_RV > 0, logits_RV / repetition, logits_RV * repetition)
    logits_RV = torch.where(seen_RV, repeated_RV, logits_RV)
    logits_RV = logits_RV - column("frequency_penalty") * counts_RV
    return logits_RV - column("presence_penalty") * (counts_RV > 0)


def _width(sampling: Sampling, vocabulary: int) -> int:
    """How many of the most likely tokens are sorted at first; 0: none, the choice is among all."""
    if sampling.top_k:
        width = 1 << (sampling.top_k - 1).bit_length()
    elif sampling.top_p < 1.0 or sampling.min_p > 0.0:
        width = _FIRST_LOOK
    else:
        return 0
    # Selecting costs as much as sorting where much is selected.
    return width if width * 4 <= vocabulary else vocabulary


def _choose(logits_RV: torch.Tensor, draws: Sequence[Draws], width: int) -> list[int]:
    weights_RV = _probabilities(logits_RV, draws)
    uniform = torch.tensor([draw.next() for draw in draws], device=logits_RV.device, dtype=torch.float64)
    if not width:
        return _drawn(weights_RV, uniform).tolist()
    tokens, ended = _from_likely(weights_RV, uniform, draws, width)
    if open_rows := [row for row, end in enumerate(ended) if not end]:
        rest, _ = _from_likely(
            weights_RV[open_rows], uniform[open_rows], [draws[row] for row in open_rows], weights_RV.shape[1]
        )
        for row, token in zip(open_rows, rest, strict=True):
            tokens[row] = token
    return tokens


def _from_likely(
    weights_RV: torch.Tensor, uniform: torch.Tensor, draws: Sequence[Draws], width: int
) -> tuple[list[int], list[bool]]:
    """Draw from the likely tokens that top-k, top-p (Holtzman et al., arXiv:1904.09751) and min-p leave.

    Returns:
        A token per row, and whether the row's cut lies within the `width` most likely.
    """
    vocabulary = weights_RV.shape[1]
    if width < vocabulary:
        sorted_RW, order_RW = weights_RV.topk(width, dim=-1)
    else:
        sorted_RW, order_RW = weights_RV.sort(dim=-1, descending=True, stable=True)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=weights_RV.device, dtype=torch.float64)[:, None]

    top_k = column([float(draw.sampling.top_k or vocabulary) for draw in draws])
    top_p = column([draw.sampling.top_p for draw in draws])
    min_p = column([draw.sampling.min_p for draw in draws])
    beyond_RW = torch.arange(width, device=weights_RV.device) >= top_k
    mass = sorted_RW.masked_fill(beyond_RW, 0.0).sum(-1, keepdim=True)
    # Without top-k the whole distribution counts, also what lies beyond the width.
    mass = torch.where(top_k < vocabulary, mass, torch.ones_like(mass))
    before_RW = sorted_RW.cumsum(dim=-1) - sorted_RW
    beyond_RW |= (before_RW >= top_p * mass) & (top_p < 1.0)
    beyond_RW |= sorted_RW < min_p * sorted_RW[:, :1]
    beyond_RW[:, 0] = False
    ended = (beyond_RW[:, -1] | (width >= vocabulary) | (top_k[:, 0] <= width)).tolist()
    place_R = _drawn(sorted_RW.masked_fill(beyond_RW, 0.0), uniform)
    return order_RW.gather(1, place_R[:, None])[:, 0].tolist(), ended


def _probabilities(logits_RV: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    temperature = torch.tensor([draw.sampling.temperature for draw in draws], device=logits_RV.device)
    # Subtracting the maximum first keeps a small temperature from overflowing.
    shifted_RV = logits_RV - logits_RV.max(dim=-1, keepdim=True).values
    return torch.softmax(shifted_RV / temperature[:, None], dim=-1).double()


def _drawn(weights_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Places `[rows]` drawn in proportion to non-negative weights, by inverse-transform sampling."""
    cumulative_RV = weights_RV.cumsum(dim=-1)
    total_R1 = cumulative_RV[:, -1:].contiguous()
    # Rounding may take the product up to the total, which no place lies beyond.
    target_R1 = torch.minimum(uniform_R[:, None] * total_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    return torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
