"""Distillation against the losses of TRL's distillation trainers: value and gradient."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from ftray.core.spec import parse
from ftray.model.build import load_model
from ftray.model.policy import Policy
from ftray.objective import logprob
from ftray.objective.distill import Distill
from ftray.objective.lm import SupervisedFineTuning
from ftray.testing import tiny
from tests.unit.objective.batches import pair_batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that its place in TRL is not settled
    from trl.experimental.gkd import GKDTrainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider, deeper and of another architecture."""
    folder = tmp_path_factory.mktemp("teacher") / "qwen3"
    return tiny.tiny_base(folder, "qwen3", seed=7, hidden_size=96, num_hidden_layers=3)


def ours(policy: Policy, batch: Any, **settings: Any) -> torch.Tensor:
    objective = parse(Distill, {"teacher_model_name_or_path": "x", **settings})
    sums, weights = objective.sums(policy, batch), objective.weights(batch)
    assert sums.keys() == weights.keys()
    return torch.stack([sums[name] / weights[name] for name in sums]).sum()


def logits_of_targets(model: Any, batch: Any) -> torch.Tensor:
    """Each document through transformers' own forward; the logits that predict its targets, `[T, V]`."""
    found = []
    bounds = batch.cu_seq_lens.tolist()
    for start, stop in itertools.pairwise(bounds):
        mask = batch.labels[0, start + 1 : stop] != -100
        found.append(model(batch.input_ids[:, start:stop]).logits[0, :-1][mask])
    return torch.cat(found)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1 << 22, 258 * 5])
def test_equals_trl(
    beta: float, chunk: int, tiny_base: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob, "_CHUNK_ELEMENTS", chunk)
    batch = pair_batch()
    student = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    frozen = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).requires_grad_(False)
    theirs = GKDTrainer.generalized_jsd_loss(
        logits_of_targets(student, batch)[None],
        logits_of_targets(frozen, batch)[None],
        labels=batch.labels[:, batch.labels[0] != -100],
        beta=beta,
        temperature=1.7,
    )
    theirs.backward()
    model, guide = load_model(tiny_base).requires_grad_(True), load_model(teacher)
    loss = ours(Policy(model, teacher=guide), batch, beta=beta, temperature=1.7)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    for (name, mine), (_, their) in zip(model.named_parameters(), student.named_parameters(), strict=True):
        assert mine.grad is not None and their.grad is not None, name
        scale = their.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-5, atol=1e-5 * scale, msg=name)
    assert all(parameter.grad is None for parameter in guide.parameters())


@torch.no_grad()
def test_equals_trls_distillation_trainer(tiny_base: Path, teacher: Path) -> None:
    batch, student, guide = pair_batch(), load_model(tiny_base), load_model(teacher)
    predicts = torch.zeros_like(batch.labels)
    predicts[0, :-1] = batch.labels[0, 1:] != -100
    policies = [Policy(student), Policy(guide)]
    hidden = [policy.hidden(batch)[None] for policy in policies]
    heads = [policy.head.plain_weight for policy in policies]
    theirs = _chunked_divergence_loss(*hidden, *heads, predicts, beta=0.5, temperature=0.8)[0]
    loss = ours(Policy(student, teacher=guide), batch, beta=0.5, temperature=0.8)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)


@torch.no_grad()
def test_alpha_mixes_in_the_ordinary_loss(tiny_base: Path, teacher: Path) -> None:
    batch, policy = pair_batch(), Policy(load_model(tiny_base), teacher=load_model(teacher))
    hard = SupervisedFineTuning().sums(policy, batch)["nll"] / batch.weights.sum()
    soft = ours(policy, batch, beta=0.0)
    mixed = ours(policy, batch, beta=0.0, alpha=0.25)
    assert mixed.item() == pytest.approx((0.25 * hard + 0.75 * soft).item(), rel=1e-5)
    assert ours(policy, batch, alpha=1.0).item() == pytest.approx(hard.item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teacher_that_is_the_student_has_nothing_to_say(beta: float, tiny_base: Path) -> None:
    policy = Policy(load_model(tiny_base), teacher=load_model(tiny_base))
    assert ours(policy, pair_batch(), beta=beta).item() == pytest.approx(0.0, abs=1e-6)


@torch.no_grad()
def test_embeddings_padded_to_another_size_are_cut(tiny_base: Path, tmp_path: Path) -> None:
    """As in families whose larger models have more unused rows."""
    wide = tiny.tiny_base(tmp_path / "wide", seed=7, vocab_size=320)
    batch, student, guide = pair_batch(), load_model(tiny_base), load_model(wide)
    loss = ours(Policy(student, teacher=guide), batch)
    log_p = torch.log_softmax(logits_of_targets(guide, batch)[:, :258], 1)
    log_q = torch.log_softmax(logits_of_targets(student, batch), 1)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
