"""Distillation: the student's distribution over the next token is drawn to a teacher's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.head import Head
from ftray.model.policy import Policy
from ftray.objective.base import Objective
from ftray.objective.logprob import over_chunks, select_targets, target_weight


@spec
class Distill(Objective):
    """Distillation on the target tokens of the rows (Hinton et al., arXiv:1503.02531).

    The loss is `alpha * cross-entropy + (1 - alpha) * divergence(teacher, student)`, a mean over target tokens. As
    in TRL, the divergence is not scaled by the squared temperature.
    """

    pairs: ClassVar[bool] = False

    teacher_model_name_or_path: str
    """Folder or Hub id of the teacher; its tokenizer must be the student's."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both logits in the divergence; above 1 the teacher's less likely tokens count more."""
    alpha: float = Field(default=0.0, ge=0, le=1)
    """Share of the ordinary cross-entropy with the rows' own tokens."""
    beta: float = Field(default=0.0, ge=0, le=1)
    """Divergence: 0 the forward KL (teacher from student), 1 the reverse KL, between them the generalised
    Jensen-Shannon divergence."""

    @property
    def teacher_model(self) -> str:
        """The teacher."""
        return self.teacher_model_name_or_path

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The sum of the target weights, for both terms."""
        return dict.fromkeys(self._shares(), target_weight(batch))

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        """`divergence` and, if it has a share, `nll`."""
        assert policy.teacher is not None
        with torch.no_grad():
            teacher_ND = policy.teacher.hidden(batch)
        hidden_ND = policy.hidden(batch)
        where, labels_T, weights_T = select_targets(batch)
        shares = self._shares()
        if not len(where):
            return dict.fromkeys(shares, hidden_ND.float().sum() * 0.0)
        chunk = _Chunk(policy.teacher.head, self.temperature, self.beta)
        parts = over_chunks(policy, chunk, hidden_ND[where], teacher_ND[where], labels_T, weights_T)
        divergence, nll = torch.stack(parts).sum(0)
        return {name: share * {"divergence": divergence, "nll": nll}[name] for name, share in shares.items()}

    def _shares(self) -> dict[str, float]:
        return {
            name: share for name, share in {"divergence": 1 - self.alpha, "nll": self.alpha}.items() if share
        }


class _Chunk:
    """Divergence and cross-entropy of a chunk of targets, `[2]`."""

    def __init__(self, teacher: Head, temperature: float, beta: float) -> None:
        self.teacher, self.temperature, self.beta = teacher, temperature, beta

    def __call__(self, head: Any, *chunk: torch.Tensor) -> torch.Tensor:
        hidden_CD, teacher_CD, label_C, weight_C = chunk
        student_CV = head(hidden_CD)
        with torch.no_grad():
            teacher_CV = self.teacher(teacher_CD)
        # Models of one family pad their embeddings to different sizes; what is beyond the smaller means no token.
        width = min(student_CV.shape[1], teacher_CV.shape[1])
        log_q_CV = F.log_softmax(student_CV[:, :width] / self.temperature, 1)
        log_p_CV = F.log_softmax(teacher_CV[:, :width] / self.temperature, 1)
        divergence_C = generalised_jsd(log_p_CV, log_q_CV, self.beta)
        nll_C = F.cross_entropy(student_CV, label_C, reduction="none")
        return torch.stack([(divergence_C * weight_C).sum(), (nll_C * weight_C).sum()])


def generalised_jsd(log_p_CV: torch.Tensor, log_q_CV: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence of each row, `[C]` (Agarwal et al., arXiv:2306.13649, equation 1).

    Args:
        log_p_CV: log-probabilities of the teacher.
        log_q_CV: log-probabilities of the student.
        beta: weight of the teacher in the mixture; 0 gives `KL(p || q)`, 1 gives `KL(q || p)`.
    """
    if beta in (0.0, 1.0):
        first, second = (log_p_CV, log_q_CV) if beta == 0.0 else (log_q_CV, log_p_CV)
        return (first.exp() * (first - second)).sum(1)
    log_beta = torch.log(torch.tensor([beta, 1 - beta], device=log_p_CV.device))
    log_m_CV = torch.logaddexp(log_p_CV + log_beta[0], log_q_CV + log_beta[1])
    kl_p_C = (log_p_CV.exp() * (log_p_CV - log_m_CV)).sum(1)
    kl_q_C = (log_q_CV.exp() * (log_q_CV - log_m_CV)).sum(1)
    return beta * kl_p_C + (1 - beta) * kl_q_C
