"""Fine-tuning against TRL's `SFTTrainer` on the same documents: loss and gradient."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ftray.data.batch import Batch
from ftray.model.build import load_model
from ftray.model.policy import Policy
from ftray.objective import logprob
from ftray.objective.lm import LanguageModelling, SupervisedFineTuning
from tests.unit.objective.batches import join

PROMPTS, LENGTHS = (5, 9, 3, 1), (12, 16, 40, 7)


def documents(every_token: bool) -> Batch:
    """Prompts and answers end to end; of the answers, or of all but each first token, every one is a target."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 250, (length,), generator=generator) for length in LENGTHS]
    begins = [1 if every_token else prompt for prompt in PROMPTS]
    targets = [torch.arange(n) >= begin for n, begin in zip(LENGTHS, begins, strict=True)]
    return join(ids, targets, [1] * len(ids))


def examples(batch: Batch) -> list[dict[str, Any]]:
    """The documents as rows of token ids, as TRL takes what is tokenised."""
    bounds = batch.cu_seq_lens.tolist()
    return [
        {
            "input_ids": batch.input_ids[0, start:stop].tolist(),
            "completion_mask": [int(at >= prompt) for at in range(stop - start)],
        }
        for (start, stop), prompt in zip(itertools.pairwise(bounds), PROMPTS, strict=True)
    ]


def sft_trainer(base: Path, rows: list[dict[str, Any]], folder: Path, every_token: bool) -> SFTTrainer:
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            completion_only_loss=not every_token,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


@pytest.mark.parametrize("objective", [SupervisedFineTuning(), LanguageModelling()], ids=["sft", "lm"])
@pytest.mark.parametrize("chunk", [1 << 22, 258 * 5])
def test_loss_and_gradient_equal_trls(
    objective: Any, chunk: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL masks and collates the rows itself and is asked for its loss, as its loop asks."""
    monkeypatch.setattr(logprob, "_CHUNK_ELEMENTS", chunk)
    batch = documents(objective.every_token)
    trainer = sft_trainer(tiny_base, examples(batch), tmp_path, objective.every_token)
    assert trainer.train_dataset is not None
    inputs = trainer.data_collator(list(trainer.train_dataset))
    learnt = inputs["labels"][:, 1:] != -100
    assert int(learnt.sum()) == batch.num_targets
    theirs = trainer.compute_loss(trainer.model.train(), inputs)
    theirs.backward()
    model = load_model(tiny_base).train().requires_grad_(True)
    ours = objective.sums(Policy(model), batch)["nll"] / objective.weights(batch)["nll"]
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for (name, mine), their in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        scale = their.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-5, atol=1e-5 * scale, msg=name)
