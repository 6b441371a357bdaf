"""Direct preference optimisation and its relatives: a reward that is a ratio of two policies."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.objective.base import Objective
from ftray.objective.logprob import document_logps, document_targets
from ftray.objective.pairs import REWARD_METRICS, chosen_documents, num_pairs, reward_metrics


@spec
class DPO(Objective):
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290).

    An answer's implicit reward is `beta * (log p - log p_reference)`, summed over its tokens. The reference is the
    model with the adapter off, or a frozen copy of the base where every weight trains.
    """

    pairs: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = (*REWARD_METRICS, "logps/chosen", "logps/rejected")

    beta: float = Field(default=0.1, gt=0)
    """How far the policy may go from the reference: small is far. For `ipo` it is the paper's tau."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """`sigmoid`: DPO; `hinge`: SLiC (Zhao et al., arXiv:2305.10425); `ipo`: squared, per token (Azar et al.,
    arXiv:2310.12036); `robust`: unbiased under wrong labels (Chowdhury et al., arXiv:2403.00409)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a pair is labelled the wrong way round: conservative DPO with `sigmoid`, or for `robust`."""
    reference_free: bool = False
    """Compare with a uniform reference instead of the base: half the forward passes."""

    def __post_init__(self) -> None:
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise ConfigError(
                f"label_smoothing: {self.label_smoothing} has no meaning for loss_type `{self.loss_type}`; "
                "set it to 0, or take `sigmoid` or `robust`"
            )

    @property
    def needs_reference(self) -> bool:
        """Unless it is free of one."""
        return not self.reference_free

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The number of pairs, for every term."""
        return dict.fromkeys(("dpo", *self.metrics), float(num_pairs(batch)))

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        """`dpo`: the loss of each pair, and sums of the rewards."""
        chosen_P = chosen_documents(batch)
        reference_D: torch.Tensor | float = 0.0
        if self.needs_reference:
            # First, so that nothing of the policy's pass is kept meanwhile.
            with policy.reference():
                reference_D = document_logps(policy, batch)
        logps_D = document_logps(policy, batch)
        ratio_D = logps_D - reference_D
        chosen, rejected = ratio_D[chosen_P], ratio_D[chosen_P + 1]
        rewards = reward_metrics(self.beta * chosen, self.beta * rejected)
        if self.loss_type == "ipo":
            length_D = document_targets(batch).clamp(min=1.0)
            chosen, rejected = chosen / length_D[chosen_P], rejected / length_D[chosen_P + 1]
        logps_D = logps_D.detach()
        return {
            "dpo": self._loss(chosen - rejected).sum(),
            **rewards,
            "logps/chosen": logps_D[chosen_P].sum(),
            "logps/rejected": logps_D[chosen_P + 1].sum(),
        }

    def _loss(self, margin_P: torch.Tensor) -> torch.Tensor:
        if self.loss_type == "ipo":
            return (margin_P - 1 / (2 * self.beta)) ** 2
        logit_P = self.beta * margin_P
        if self.loss_type == "hinge":
            return torch.relu(1 - logit_P)
        smooth = self.label_smoothing
        right_P, wrong_P = -F.logsigmoid(logit_P), -F.logsigmoid(-logit_P)
        if self.loss_type == "robust":
            return ((1 - smooth) * right_P - smooth * wrong_P) / (1 - 2 * smooth)
        return (1 - smooth) * right_P + smooth * wrong_P
