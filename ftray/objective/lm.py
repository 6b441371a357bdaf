"""Next-token prediction: over all of a text (`lm`) or over its target spans (`sft`)."""

from collections.abc import Mapping

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
    """The same loss for plain text, where the data plane marks every token as a target."""
