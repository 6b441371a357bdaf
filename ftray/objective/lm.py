"""Next-token prediction: over all of a text (`lm`) or over its target spans (`sft`)."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.objective.base import Objective
from ftray.objective.logprob import target_weight, weighted_nll


@spec
class SupervisedFineTuning(Objective):
    """Negative log-likelihood of the target tokens, divided by the global sum of their weights."""

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """`nll`: the sum of the target weights."""
        return {"nll": target_weight(batch)}

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        """`nll`: the weighted negative log-likelihood."""
        return {"nll": weighted_nll(policy, batch)}


@spec
class LanguageModelling(SupervisedFineTuning):
    """The same over every token but the first of a document, prompts included.

    It is TRL's `completion_only_loss=False`. Transforms that leave targets out when rows are read, as `goldfish`,
    choose among all of them.
    """

    every_token: ClassVar[bool] = True
