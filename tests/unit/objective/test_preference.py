"""Preference objectives against TRL's trainers on the same pairs: loss, gradient and what is logged."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from ftray.adapt.lora import LoRA, lora_layers
from ftray.core.errors import ConfigError
from ftray.core.spec import parse
from ftray.model.build import load_model
from ftray.model.policy import Policy
from ftray.objective import logprob
from ftray.objective.base import loss_of
from ftray.objective.dpo import DPO
from ftray.objective.logprob import document_logps, document_targets
from ftray.objective.reward import Reward
from ftray.testing import tiny
from tests.unit.objective.batches import padded_pairs, pair_batch

SETTINGS = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_dropout": True,
}
ROWS = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_base(tmp_path_factory.mktemp("other") / "llama", seed=7)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dpo_trainer(model: Any, reference: Any, base: Path, tmp_path: Path, **settings: Any) -> DPOTrainer:
    return DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path), **SETTINGS, **settings),
        train_dataset=ROWS,
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def means(objective: Any, policy: Policy, batch: Any) -> dict[str, torch.Tensor]:
    sums, weights = objective.sums(policy, batch), objective.weights(batch)
    assert sums.keys() == weights.keys()
    return {name: value / weights[name] for name, value in sums.items()}


def trl_metrics(trainer: Any) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "hinge", "beta": 0.02},
        {"loss_type": "ipo", "beta": 0.3},
        {"loss_type": "robust", "label_smoothing": 0.2},
    ],
    ids=lambda settings: settings["loss_type"],
)
@pytest.mark.parametrize("chunk", [1 << 22, 258 * 5])
def test_dpo_equals_trl(
    settings: dict[str, Any],
    chunk: int,
    tiny_base: Path,
    other_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every weight trains; the reference is another model, so that no ratio is zero."""
    monkeypatch.setattr(logprob, "_CHUNK_ELEMENTS", chunk)
    batch = pair_batch()
    trainer = dpo_trainer(plain(tiny_base), plain(other_base), tiny_base, tmp_path, **settings)
    theirs = trainer.compute_loss(trainer.model.train(), padded_pairs(batch))
    theirs.backward()
    model = load_model(tiny_base).train().requires_grad_(True)
    objective = parse(DPO, settings)
    ours = means(objective, Policy(model, reference=load_model(other_base)), batch)
    loss = loss_of(objective, {name: value.item() for name, value in ours.items()})
    assert loss == pytest.approx(theirs.item(), rel=1e-5) == ours["dpo"].item()
    ours["dpo"].backward()
    for (name, mine), (_, their) in zip(
        model.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        scale = their.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-5, atol=1e-5 * scale, msg=name)
    logged = trl_metrics(trainer)
    for name in objective.metrics:
        assert ours[name].item() == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


def test_dpo_of_an_adapter_equals_trl(tiny_base: Path, tmp_path: Path) -> None:
    """The reference is the base with the adapter off."""
    batch = pair_batch()
    model = load_model(tiny_base).train()
    adapt = LoRA(r=4)
    adapt.apply(model, seed=0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"], std=0.2)
    adapt.save(model, model.named_parameters(), tmp_path / "delta", str(tiny_base))
    peft = PeftModel.from_pretrained(plain(tiny_base), tmp_path / "delta", is_trainable=True)
    trainer = dpo_trainer(peft, None, tiny_base, tmp_path)
    # TRL's reference is a copy of the adapter it is given; without the copy it is the base, as ours.
    trainer.model.delete_adapter("ref")
    theirs = trainer.compute_loss(trainer.model.train(), padded_pairs(batch))
    theirs.backward()
    ours = means(DPO(), Policy(model), batch)["dpo"]
    ours.backward()
    assert model.training and model.ftray_route.active == "default"
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert abs(ours.item() - 0.6931) > 0.01, "the reference must differ"
    for name, layer in lora_layers(model).items():
        their = trainer.model.get_submodule(f"base_model.model.{name}")
        for factor, module in ((layer.lora_A, their.lora_A), (layer.lora_B, their.lora_B)):
            expected = module["default"].weight.grad
            scale = expected.abs().max().item()
            torch.testing.assert_close(factor["default"].grad, expected, rtol=1e-5, atol=1e-5 * scale)


def test_conservative_dpo_mixes_both_labellings(tiny_base: Path, other_base: Path, tmp_path: Path) -> None:
    batch = pair_batch()
    trainer = dpo_trainer(plain(tiny_base), plain(other_base), tiny_base, tmp_path)
    inputs = padded_pairs(batch)
    swapped = {key: torch.cat([value[3:], value[:3]]) for key, value in inputs.items()}
    right, wrong = (trainer.compute_loss(trainer.model, x).item() for x in (inputs, swapped))
    policy = Policy(load_model(tiny_base), reference=load_model(other_base))
    ours = means(DPO(label_smoothing=0.3), policy, batch)["dpo"].item()
    assert ours == pytest.approx(0.7 * right + 0.3 * wrong, rel=1e-5)


@torch.no_grad()
def test_a_free_reference_is_zero_and_a_fresh_adapter_is_its_reference(tiny_base: Path) -> None:
    batch, model = pair_batch(), load_model(tiny_base)
    free = DPO(reference_free=True)
    logps = document_logps(Policy(model), batch)
    expected = -F.logsigmoid(0.1 * (logps[0:6:2] - logps[1:6:2])).mean()
    assert not free.needs_reference
    assert means(free, Policy(model), batch)["dpo"].item() == pytest.approx(expected.item(), rel=1e-6)
    LoRA().apply(model, seed=0)
    assert means(DPO(), Policy(model), batch)["dpo"].item() == pytest.approx(0.693147, abs=1e-6)


def test_smoothing_without_meaning_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing: 0\.1 has no meaning for loss_type `ipo`"):
        parse(DPO, {"loss_type": "ipo", "label_smoothing": 0.1})


def test_reference_runs_without_dropout(tmp_path: Path) -> None:
    """A model with dropout of its own (GPT-2) still has one reference value."""
    base = tiny.tiny_base(tmp_path, "gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    model = load_model(base).train()
    LoRA().apply(model, seed=0)
    policy, batch = Policy(model), pair_batch()
    with policy.reference():
        first, second = document_logps(policy, batch), document_logps(policy, batch)
    assert torch.equal(first, second) and not first.requires_grad
    assert not torch.equal(document_logps(policy, batch), document_logps(policy, batch))


@torch.no_grad()
def test_document_logps_are_those_of_the_documents_alone(tiny_base: Path) -> None:
    model, batch = load_model(tiny_base), pair_batch()
    bounds = batch.cu_seq_lens.tolist()
    expected = []
    for start, stop in itertools.pairwise(bounds):
        logps = torch.log_softmax(model(batch.input_ids[:, start:stop]).logits[0, :-1], -1)
        labels = batch.labels[0, start + 1 : stop]
        mask = labels != -100
        expected.append(logps[mask].gather(1, labels[mask][:, None]).sum())
    torch.testing.assert_close(
        document_logps(Policy(model), batch), torch.stack(expected), rtol=1e-5, atol=1e-4
    )
    lengths = [int((batch.labels[0, a:b] != -100).sum()) for a, b in itertools.pairwise(bounds)]
    assert document_targets(batch).tolist() == lengths


@pytest.mark.parametrize("settings", [{}, {"margin": 0.7, "center_rewards_coefficient": 0.05}], ids=str)
def test_reward_equals_trl(settings: dict[str, float], tiny_base: Path, tmp_path: Path) -> None:
    batch = pair_batch()
    objective = parse(Reward, settings)
    model = load_model(tiny_base).train()
    objective.extend(model, seed=0)
    model.requires_grad_(True)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tiny_base, num_labels=1, dtype=torch.float32
    )
    with torch.no_grad():
        classifier.score.weight.copy_(model.score.weight)
    config = RewardConfig(
        output_dir=str(tmp_path),
        center_rewards_coefficient=settings.get("center_rewards_coefficient"),
        **SETTINGS,
    )
    trainer = RewardTrainer(
        classifier, args=config, train_dataset=ROWS, processing_class=AutoTokenizer.from_pretrained(tiny_base)
    )
    inputs = {key: value for key, value in padded_pairs(batch).items() if key != "completion_mask"}
    if margin := settings.get("margin"):
        inputs["margin"] = torch.full((3,), margin)
    theirs = trainer.compute_loss(trainer.model.train(), inputs)
    theirs.backward()
    ours = means(objective, Policy(model), batch)
    loss = sum(value for name, value in ours.items() if name not in objective.metrics)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        if name in expected:
            wanted = expected[name].grad
            scale = wanted.abs().max().item()
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-5 * scale, msg=name)
    logged = trl_metrics(trainer)
    assert float(ours["rewards/accuracies"]) == pytest.approx(logged["accuracy"])
    assert float(ours["rewards/margins"]) == pytest.approx(logged["margin"], rel=1e-4)


def test_a_batch_without_pairs_has_no_loss_and_no_gradient(tiny_base: Path) -> None:
    """A rank whose rows are padding only still runs forward and backward."""
    batch = pair_batch(())
    model = load_model(tiny_base)
    Reward().extend(model, seed=0)
    model.requires_grad_(True)
    for objective, policy in (
        (DPO(), Policy(model, reference=load_model(tiny_base))),
        (Reward(), Policy(model)),
    ):
        assert set(objective.weights(batch).values()) == {0.0}
        sums = objective.sums(policy, batch)
        loss = sum(value for name, value in sums.items() if name not in objective.metrics)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
