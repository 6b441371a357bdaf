"""Rank the allowed answers of a question by their log-probability.

A small base does not know the form of an answer, so what it would say freely is always wrong; which of the
allowed answers it finds most likely is the fair question to ask it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ftray.core.errors import ModelError
from ftray.engine.api import Engine, ScoreItem

_TOLERANCE = 1e-3


class Scorer(Protocol):
    """Log-probabilities of several continuations of one prompt."""

    def score(
        self, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], delta: str | None
    ) -> list[float]:
        """Sum of the log-probabilities (natural logarithm) of each answer's tokens after the prompt."""
        ...


class EngineScorer:
    """Scores with any engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def score(
        self, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], delta: str | None
    ) -> list[float]:
        """See `Scorer.score`."""
        items = [ScoreItem(prompt_ids=prompt_ids, completion_ids=ids, delta=delta) for ids in answers]
        return self._engine.score(items)


class ModelScorer:
    """Scores with a causal language model of Hugging Face's form; a prompt is computed once for all answers.

    Args:
        model: `model(input_ids, past_key_values=..., use_cache=...)` with `.logits`.
        use_delta: makes a delta active before a forward pass (None: the bare base).

    Whether the model's cache may be shared so is tried on the first prompt; if the result differs from the plain
    one, every answer is computed with the whole prompt.
    """

    def __init__(self, model: nn.Module, use_delta: Callable[[str | None], None] | None = None) -> None:
        self._model = model
        self._use_delta = use_delta
        self._shares_prompt: bool | None = None

    def score(
        self, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], delta: str | None
    ) -> list[float]:
        """See `Scorer.score`."""
        assert prompt_ids and answers and all(answers)
        if self._use_delta is not None:
            self._use_delta(delta)
        elif delta is not None:
            raise ModelError(f"{delta}: this model has no deltas; load it first")
        if self._shares_prompt is None:
            plain = whole_scores(self._model, prompt_ids, answers)
            self._shares_prompt = _agree(self._model, prompt_ids, answers, plain)
            return plain
        function = shared_scores if self._shares_prompt else whole_scores
        return function(self._model, prompt_ids, answers)


@torch.inference_mode()
def whole_scores(
    model: nn.Module, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[float]:
    """Scores by one forward pass over prompt and answer, all answers in one batch."""
    rows = [[*prompt_ids, *answer] for answer in answers]
    logits_BTV = model(input_ids=_padded(rows, model), use_cache=False).logits
    return _sums(logits_BTV[:, len(prompt_ids) - 1 :], answers)


@torch.inference_mode()
def shared_scores(
    model: nn.Module, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[float]:
    """Scores by one forward pass over the prompt, and one over all answers on copies of its cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    first = model(input_ids=_padded([prompt_ids], model), past_key_values=cache, use_cache=True).logits[
        :, -1:
    ]
    logits_B1V = first.expand(len(answers), -1, -1)
    longest = max(len(answer) for answer in answers)
    if longest == 1:
        return _sums(logits_B1V, answers)
    cache.batch_repeat_interleave(len(answers))
    # The last token of an answer predicts nothing that is asked for.
    inputs = _padded([answer[:-1] for answer in answers], model)
    rest_BTV = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits
    return _sums(torch.cat([logits_B1V, rest_BTV], 1), answers)


def load_scorer(
    base: str, deltas: Mapping[str, Path] | None = None, *, dtype: str = "float32", device: str = "auto"
) -> ModelScorer:
    """A scorer over a base folder, with low-rank deltas by name.

    Args:
        base: model folder or Hub id.
        deltas: PEFT-format folders by name.
        dtype: type of the base's weights.
        device: `auto` or a torch device.

    Raises:
        ModelError, DeltaError: one line.
    """
    from ftray.adapt.lora import load_adapter
    from ftray.adapt.route import Route
    from ftray.engine.settings import pick_device
    from ftray.model.build import load_model
    from ftray.model.folder import resolve_folder

    model: Any = load_model(resolve_folder(base), dtype=dtype, attn="sdpa").to(pick_device(device))
    keys: dict[str | None, str | None] = {None: None}
    for name, folder in (deltas or {}).items():
        keys[name] = f"delta{len(keys)}"
        load_adapter(model, str(keys[name]), folder)
    route: Route = getattr(model, "ftray_route", None) or Route()

    def use_delta(delta: str | None) -> None:
        route.active = keys[delta]

    return ModelScorer(model, use_delta)


def _agree(
    model: nn.Module, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], plain: Sequence[float]
) -> bool:
    try:
        shared = shared_scores(model, prompt_ids, answers)
    except (TypeError, ValueError, AttributeError):  # a model that keeps its state elsewhere
        return False
    return all(abs(x - y) <= _TOLERANCE * max(1.0, abs(y)) for x, y in zip(shared, plain, strict=True))


def _padded(rows: Sequence[Sequence[int]], model: nn.Module) -> torch.Tensor:
    """Rows filled up on the right, where a causal model does not look. [B, T]"""
    longest = max(len(row) for row in rows)
    filled = [[*row, *[0] * (longest - len(row))] for row in rows]
    return torch.tensor(filled, device=next(model.parameters()).device).reshape(len(rows), longest)


def _sums(logits_BTV: torch.Tensor, answers: Sequence[Sequence[int]]) -> list[float]:
    """Sum over each answer's tokens; position t of the logits predicts token t of the answer."""
    sums = []
    for logits_TV, answer in zip(logits_BTV, answers, strict=True):
        logprobs = torch.log_softmax(logits_TV[: len(answer)].float(), -1)
        chosen = logprobs.gather(1, torch.tensor(answer, device=logprobs.device)[:, None])
        sums.append(float(chosen.double().sum()))
    return sums
