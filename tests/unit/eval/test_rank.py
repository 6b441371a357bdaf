"""Ranking: batched and shared-prompt scores equal a naive loop, under the base and under deltas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftray.core.errors import ModelError
from ftray.eval import rank
from ftray.testing import tiny

PROMPT = list(range(40, 75))
ANSWERS = [[70], [71, 72, 73], [70, 71], [90, 91, 92, 93, 94, 0]]
TOLERANCE = 1e-4


def naive(model: Any, prompt: list[int], answer: list[int]) -> float:
    """One forward pass for every token."""
    total, ids = 0.0, list(prompt)
    for token in answer:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), -1)[token])
        ids.append(token)
    return total


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])  # mistral: prompt beyond its window
def test_scores_equal_a_naive_loop(architecture: str, tmp_path: Path) -> None:
    folder = tiny.tiny_base(tmp_path / architecture, architecture)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = pytest.approx([naive(model, PROMPT, answer) for answer in ANSWERS], abs=TOLERANCE)
    assert rank.whole_scores(model, PROMPT, ANSWERS) == expected
    assert rank.shared_scores(model, PROMPT, ANSWERS) == expected
    (first,) = rank.shared_scores(model, PROMPT, ANSWERS[:1])
    assert first == pytest.approx(naive(model, PROMPT, ANSWERS[0]), abs=TOLERANCE)
    scorer = rank.ModelScorer(model)
    assert scorer.score(PROMPT, ANSWERS, None) == expected
    assert scorer.score(PROMPT, ANSWERS, None) == expected


def test_scores_under_deltas_equal_plain_peft(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    scorer = rank.load_scorer(str(tiny_base), tiny_adapters)
    for name, folder in tiny_adapters.items():
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        tuned = PeftModel.from_pretrained(base, str(folder)).eval()
        expected = [naive(tuned, PROMPT, answer) for answer in ANSWERS]
        assert scorer.score(PROMPT, ANSWERS, name) == pytest.approx(expected, abs=TOLERANCE)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    expected = [naive(base, PROMPT, answer) for answer in ANSWERS]
    assert scorer.score(PROMPT, ANSWERS, None) == pytest.approx(expected, abs=TOLERANCE)


class ForgetfulModel(torch.nn.Module):
    """Takes a cache and never looks into it: predicts the next number from the last token alone, plus a count."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.table = torch.nn.Embedding(300, 300)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        seen = torch.arange(input_ids.shape[1])[None, :, None] / 10
        logits = self.table(input_ids) * seen
        return type("Output", (), {"logits": logits})()


def test_model_that_ignores_the_cache_gets_whole_prompts(tiny_base: Path) -> None:
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = ForgetfulModel(AutoConfig.from_pretrained(tiny_base))
    expected = pytest.approx([naive(model, PROMPT, answer) for answer in ANSWERS], abs=TOLERANCE)
    try:
        shared = rank.shared_scores(model, PROMPT, ANSWERS)
    except (TypeError, ValueError, AttributeError):
        shared = []
    assert shared != expected
    scorer = rank.ModelScorer(model)
    for _ in range(2):
        assert scorer.score(PROMPT, ANSWERS, None) == expected


def test_delta_without_deltas_is_refused(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with pytest.raises(ModelError, match="no deltas"):
        rank.ModelScorer(model).score(PROMPT, ANSWERS, "tone")
