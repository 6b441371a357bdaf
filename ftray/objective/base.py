"""What an objective is: from a policy and a batch to named sums with known weights."""

from collections.abc import Mapping
from typing import Protocol

import torch

from ftray.data.batch import Batch
from ftray.model.policy import Policy


class Objective(Protocol):
    """One method: one file and one line in the catalog.

    The loss of a step is `sum over terms of (sum of the term) / (its weight)`, where sums and weights run over
    all micro batches and all ranks. The weights are known before the forward pass, so one all-reduce a step
    normalises by the global count whatever the accumulation and the number of ranks.
    """

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Weight of each term in this batch (for a token loss: the sum of the target weights)."""
        ...

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Differentiable sum of each term over this batch; the same names as `weights`."""
        ...
