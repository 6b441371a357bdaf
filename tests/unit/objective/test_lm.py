"""The chunked loss against plain cross-entropy, and its gradients."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ftray.data.batch import Batch
from ftray.model.build import load_model
from ftray.model.policy import Policy
from ftray.objective import logprob
from ftray.objective.lm import SupervisedFineTuning
from ftray.testing import tiny


def make_batch(lengths: tuple[int, ...] = (7, 12, 20), weighted: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    ids = torch.randint(2, 250, (1, total), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    bounds = [0]
    for length in lengths:
        labels[:, bounds[-1]] = -100
        bounds.append(bounds[-1] + length)
    weights = torch.rand((1, total), generator=generator) + 0.5 if weighted else torch.ones(1, total)
    return Batch(
        input_ids=ids,
        labels=labels,
        weights=weights * (labels != -100),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens=torch.tensor(bounds, dtype=torch.int32),
        group_lens=torch.ones(len(lengths), dtype=torch.int32),
        row_ids=torch.tensor([0]),
    )


def plain_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Each document through the model's own forward, with full logits."""
    total = torch.zeros(())
    bounds = batch.cu_seq_lens.tolist()
    for start, stop in itertools.pairwise(bounds):
        logits = model(batch.input_ids[:, start:stop]).logits[0, :-1]
        nll = F.cross_entropy(logits, batch.labels[0, start + 1 : stop], reduction="none", ignore_index=-100)
        total = total + (nll * batch.weights[0, start + 1 : stop]).sum()
    return total


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
@pytest.mark.parametrize("chunk", [1 << 22, 258 * 5])
def test_equals_plain_cross_entropy(
    architecture: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob, "_CHUNK_ELEMENTS", chunk)
    base = tiny.tiny_base(tmp_path, architecture)
    batch = make_batch()
    ours, plain = load_model(base), load_model(base)
    mine, theirs = SupervisedFineTuning().sums(Policy(ours), batch)["nll"], plain_loss(plain, batch)
    assert float(mine) == pytest.approx(float(theirs), rel=1e-5)
    ours.requires_grad_(True)
    plain.requires_grad_(True)
    (SupervisedFineTuning().sums(Policy(ours), batch)["nll"] * 0.25).backward()
    (plain_loss(plain, batch) * 0.25).backward()
    for (name, one), (_, two) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert one.grad is not None and two.grad is not None, name
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_head_with_a_cap_takes_the_checkpointed_path(tmp_path: Path) -> None:
    """The same numbers through the path of heads that are not one matrix product."""
    base = tiny.tiny_base(tmp_path)
    batch = make_batch()
    model = load_model(base).requires_grad_(True)
    policy = Policy(model)
    policy.head.scale = 1.0 + 1e-12  # no longer plain, and no other value
    assert policy.head.plain_weight is None
    loss = SupervisedFineTuning().sums(policy, batch)["nll"]
    loss.backward()
    other = load_model(base).requires_grad_(True)
    expected = plain_loss(other, batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_weights_are_the_sum_of_target_weights() -> None:
    batch = make_batch()
    assert SupervisedFineTuning().weights(batch)["nll"] == pytest.approx(float(batch.weights.sum()), rel=1e-6)


def test_batch_without_targets_has_zero_loss_and_zero_gradient(tiny_base: Path) -> None:
    batch = make_batch()
    empty = Batch(**{**vars(batch), "labels": torch.full_like(batch.labels, -100)})
    model = load_model(tiny_base).requires_grad_(True)
    objective = SupervisedFineTuning()
    loss = objective.sums(Policy(model), empty)["nll"]
    loss.backward()
    assert loss.item() == 0 and objective.weights(empty)["nll"] == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_equals_the_loss_of_transformers(tiny_base: Path) -> None:
    """Same batch, same loss as transformers' own `labels=` path (the one TRL's SFT trainer calls)."""
    batch = make_batch((18,), weighted=False)
    model = load_model(tiny_base)
    with torch.no_grad():
        ours = SupervisedFineTuning().sums(Policy(model), batch)["nll"] / batch.weights.sum()
        theirs = model(batch.input_ids, labels=batch.labels).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
