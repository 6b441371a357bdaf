"""What an objective is: from a policy and a batch to named sums with known weights."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from ftray.data.batch import Batch
from ftray.model.policy import Policy


class Objective(Protocol):
    """One method: one file and one line in the catalog.

    The loss of a step is `sum over terms of (sum of the term) / (its weight)`, where sums and weights run over
    all micro batches and all ranks. The weights are known before the forward pass, so one all-reduce a step
    normalises by the global count whatever the accumulation and the number of ranks.
    """

    pairs: ClassVar[bool] = False
    """True if it compares the two answers of preference rows; False if it learns from documents one by one."""
    every_token: ClassVar[bool] = False
    """True if prompts are learnt as answers are, whatever the rows mark as targets."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Terms that are logged by their name and are no part of the loss."""

    @property
    def needs_reference(self) -> bool:
        """True if it asks for `policy.reference()`, the model as it was before training."""
        return False

    @property
    def teacher_model(self) -> str:
        """Folder or Hub id of a frozen model it asks for as `policy.teacher`; empty: none."""
        return ""

    def extend(self, model: Any, seed: int) -> None:
        """Add to the structure what this objective trains beside the adapter; most add nothing."""

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Weight of each term in this batch (for a token loss: the sum of the target weights)."""
        ...

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Differentiable sum of each term over this batch; the same names as `weights`."""
        ...


def loss_of(objective: Objective, means: Mapping[str, float]) -> float:
    """The loss in a set of means by term: their sum, without what is only logged."""
    return sum(mean for name, mean in means.items() if name not in objective.metrics)
