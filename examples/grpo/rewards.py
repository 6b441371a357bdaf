"""Rewards of the example: any function of prompts, completions and the rows' other columns."""

import re
from typing import Any


def is_the_sum(completions: list[str], answer: list[int], **_: Any) -> list[float]:
    """1 for the right number, 0.1 for any number, 0 for none."""
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"\d+", completion)
        scores.append(1.0 if numbers[-1:] == [str(right)] else 0.1 if numbers else 0.0)
    return scores
