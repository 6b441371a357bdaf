"""A reward model: one number for an answer, learnt from which of two is preferred."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.model.score import add_score_head
from ftray.objective.base import Objective
from ftray.objective.pairs import REWARD_METRICS, chosen_documents, num_pairs, reward_metrics


@spec
class Reward(Objective):
    """Reward model after Bradley and Terry (Ouyang et al., arXiv:2203.02155): `-log sigmoid(chosen - rejected)`.

    A head `score` over the last token of a document trains beside the adapter; what is saved loads as
    `AutoModelForSequenceClassification` with one label.
    """

    pairs: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = REWARD_METRICS

    margin: float = Field(default=0.0, ge=0)
    """By how much a chosen answer is to be above the rejected one (Touvron et al., arXiv:2307.09288)."""
    center_rewards_coefficient: float = Field(default=0.0, ge=0)
    """Weight of a term that keeps rewards around zero (Eisenstein et al., arXiv:2312.09244); TRL suggests 0.01."""

    def extend(self, model: Any, seed: int) -> None:
        """Add the head."""
        add_score_head(model, seed)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The number of pairs, for every term."""
        center = ("center",) if self.center_rewards_coefficient else ()
        return dict.fromkeys(("reward", *center, *self.metrics), float(num_pairs(batch)))

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        """`reward`: the loss of each pair; `center`: the squared sums of their rewards, if asked for."""
        last_D = batch.cu_seq_lens[1:].long() - 1
        score_D = policy.model.score(policy.hidden(batch)[last_D])[:, 0].float()
        chosen_P = chosen_documents(batch)
        chosen, rejected = score_D[chosen_P], score_D[chosen_P + 1]
        terms = {"reward": -F.logsigmoid(chosen - rejected - self.margin).sum()}
        if self.center_rewards_coefficient:
            terms["center"] = self.center_rewards_coefficient * ((chosen + rejected) ** 2).sum()
        return {**terms, **reward_metrics(chosen, rejected)}
