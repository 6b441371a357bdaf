"""Settings of sampling do to the distribution what transformers' processors do."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ftray.engine import sampling as module
from ftray.engine.api import Sampling
from ftray.engine.sampling import Draws, sample

PROMPT, ANSWER = [3, 4, 4, 9], [5, 5, 5, 6]

CASES = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 7, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "top_p": 0.9},
]


def expected(logits: torch.Tensor, settings: dict[str, float]) -> torch.Tensor:
    """The distribution transformers draws from."""
    processors = LogitsProcessorList()
    if "repetition_penalty" in settings:
        processors.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(float(settings.get("temperature", 1.0))))
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(int(settings["top_k"])))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        processors.append(MinPLogitsWarper(settings["min_p"]))
    ids = torch.tensor([PROMPT + ANSWER])
    return torch.softmax(processors(ids, logits[None].clone())[0], -1)


class Fixed(Draws):
    """A stream of evenly spread numbers, so that shares are probabilities."""

    def __init__(self, settings: dict[str, float], count: int) -> None:
        all_settings = {"temperature": 1.0} | settings
        super().__init__(Sampling(**all_settings), PROMPT + ANSWER, len(PROMPT))  # type: ignore[arg-type]
        self.numbers = iter([(at + 0.5) / count for at in range(count)])

    def next(self) -> float:
        return next(self.numbers)


@pytest.mark.parametrize("vocabulary", [40, 8192])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_shares_are_those_of_transformers(vocabulary: int, settings: dict[str, float]) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    count = 800
    draws = Fixed(settings, count)
    tokens = [sample(logits[None], [draws])[0] for _ in range(count)]
    shares = torch.bincount(torch.tensor(tokens), minlength=vocabulary) / count
    # Evenly spread numbers give each token its probability up to two numbers.
    assert (shares - expected(logits, settings)).abs().max() <= 2.5 / count


def test_presence_and_frequency_count_the_answer_alone() -> None:
    """OpenAI's definition: `logit - frequency * count - presence * (count > 0)`, over generated tokens."""
    logits = torch.zeros(1, 12)
    draws = Draws(Sampling(presence_penalty=0.5, frequency_penalty=0.25), PROMPT + ANSWER, len(PROMPT))
    changed = module._adjusted(logits, [draws])[0]
    wanted = torch.zeros(12)
    wanted[5], wanted[6] = -0.5 - 3 * 0.25, -0.5 - 0.25
    assert torch.equal(changed, wanted)
    assert torch.equal(logits, torch.zeros(1, 12))


def test_penalties_follow_an_answer_that_grows() -> None:
    tokens = [*PROMPT]
    draws = Draws(Sampling(frequency_penalty=1.0), tokens, len(PROMPT))
    logits = torch.zeros(1, 12)
    for token in (5, 5, 7):
        module._adjusted(logits, [draws])
        tokens.append(token)
    wanted = torch.zeros(12)
    wanted[5], wanted[7] = -2.0, -1.0
    assert torch.equal(module._adjusted(logits, [draws])[0], wanted)


def test_every_setting_is_the_rows_own() -> None:
    logits = torch.randn(len(CASES), 5000, generator=torch.Generator().manual_seed(2)) * 2

    def draws(number: int) -> Draws:
        settings = {"temperature": 1.0, "seed": 7 + number} | CASES[number]
        return Draws(Sampling(**settings), PROMPT + ANSWER, len(PROMPT))  # type: ignore[arg-type]

    alone = [
        [sample(logits[at : at + 1], [one])[0] for one in [draws(at)] for _ in range(5)] for at in range(8)
    ]
    crowd = [draws(at) for at in range(8)]
    together = [sample(logits, crowd) for _ in range(5)]
    assert [[step[at] for step in together] for at in range(8)] == alone


def test_draws_depend_on_seed_index_and_count_alone() -> None:
    def stream(seed: int, index: int = 0) -> list[float]:
        draws = Draws(Sampling(seed=seed), index=index)
        return [draws.next() for _ in range(4)]

    assert stream(3) == stream(3)
    assert len({*stream(3), *stream(4), *stream(3, 1)}) == 12
    assert Draws(Sampling()).next() != Draws(Sampling()).next()
    numbers = [number for seed in range(500) for number in stream(seed)]
    assert 0 <= min(numbers) < 0.01 and 0.99 < max(numbers) < 1 and abs(sum(numbers) / 2000 - 0.5) < 0.03
