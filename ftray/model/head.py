"""Hidden states and the output head apart, so that log-probabilities can be computed in chunks."""

from typing import Any

import torch
from torch import nn


class Head:
    """The output head of a causal language model: hidden states to logits, as the model's own forward does.

    Some architectures scale or cap the logits after the projection; those that transformers knows by
    configuration are applied here, and `tests/unit/model` holds each to the model's own forward.
    """

    def __init__(self, model: Any) -> None:
        self.projection: nn.Module = model.get_output_embeddings()
        text = model.config.get_text_config()
        self.softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self.scale = float(getattr(text, "logit_scale", None) or 1.0)
        if divisor := getattr(text, "logits_scaling", None):
            self.scale /= float(divisor)

    @property
    def plain_weight(self) -> torch.Tensor | None:
        """The `[V, D]` weight if the head is nothing but a matrix product, else None."""
        plain = type(self.projection) is nn.Linear and self.projection.bias is None
        return self.projection.weight if plain and self.softcap is None and self.scale == 1.0 else None  # type: ignore[return-value]

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Float32 logits `[N, V]` of hidden states `[N, D]`."""
        logits_NV = self.projection(hidden_ND).float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV
