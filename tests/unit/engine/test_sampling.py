"""Each row by its own settings, and the same draws in any company."""

import pytest
import torch

from ftray.core.errors import RequestError
from ftray.engine.api import Sampling
from ftray.engine.request import MIN_PENALTY
from ftray.engine.sampling import Draws, sample


def test_rows_do_not_disturb_each_other() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    warm = Sampling(temperature=1.0, seed=5)
    alone = [sample(logits[1:2], [draws])[0] for draws in [Draws(warm)] for _ in range(20)]
    draws = [Draws(Sampling()), Draws(warm), Draws(Sampling(temperature=2.0, seed=9))]
    together = [sample(logits, draws) for _ in range(20)]
    assert [tokens[1] for tokens in together] == alone
    assert {tokens[0] for tokens in together} == {int(logits[0].argmax())}
    assert len(set(alone)) > 3


def test_frequencies_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    draws = Draws(Sampling(temperature=1.0, seed=1))
    count = 4000
    tokens = [sample(probabilities.log()[None], [draws])[0] for _ in range(count)]
    shares = torch.tensor([tokens.count(token) / count for token in range(3)])
    assert torch.allclose(shares, probabilities, atol=0.03)  # about four standard errors


@pytest.mark.parametrize(("top_p", "allowed"), [(0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (1.0, {0, 1, 2})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, allowed: set[int]) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    draws = Draws(Sampling(temperature=1.0, top_p=top_p, seed=2))
    assert {sample(logits, [draws])[0] for _ in range(200)} == allowed


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-42, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[79.9, 80.0, -float("inf")]])
    assert sample(logits, [Draws(Sampling(temperature=temperature, seed=0))]) == [1]


def test_the_vocabulary_is_sorted_for_those_alone_who_cut_it() -> None:
    def sorts(*top_p: float) -> list[list[int]]:
        draws = [Draws(Sampling(temperature=1.0, top_p=value, seed=1)) for value in top_p]
        with torch.profiler.profile(record_shapes=True) as profile:
            sample(torch.randn(len(draws), 100), draws)
        return [event.input_shapes[0] for event in profile.events() or [] if event.name == "aten::sort"]

    assert sorts(1.0, 1.0) == []
    assert [100] not in (shapes := sorts(1.0, 0.9, 1.0)) and [1, 100] in shapes


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_a_banned_token_is_never_drawn(top_p: float) -> None:
    class Extreme(Draws):
        def __init__(self, value: float) -> None:
            super().__init__(Sampling(temperature=1.0, top_p=top_p))
            self.value = value

        def next(self) -> float:
            return self.value

    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]])
    assert [sample(logits, [Extreme(value)])[0] for value in (0.0, 1 - 2**-53)] in ([1, 2], [2, 1])


def test_a_row_that_is_not_finite_gives_no_token() -> None:
    logits = torch.zeros(3, 4)
    logits[0, 2] = float("nan")
    logits[1, 0] = -float("inf")
    tokens = sample(logits, [Draws(Sampling(temperature=t, seed=0)) for t in (0.0, 0.0, 1.0)])
    assert tokens[0] is None
    assert None not in tokens[1:]


def test_the_least_penalty_leaves_logits_finite() -> None:
    draws = Draws(Sampling(repetition_penalty=MIN_PENALTY), tokens=[0, 1], num_prompt=2)
    assert sample(torch.tensor([[1e30, -1e30, 0.0]]), [draws]) == [0]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"top_p": float("nan")},
        {"stop": ("",)},
        {"repetition_penalty": 1e-40},
    ],
)
def test_settings_out_of_range_name_the_field(settings: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]
