"""TRL's `SFTTrainer` on our packed rows, in our order: what differs is how it computes."""

import itertools
import os
from pathlib import Path
from typing import Any

os.environ |= {"WANDB_DISABLED": "true", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.train.setup import LEARNING_RATE, make_recipe, packed_rows


class _Paused(TrainerCallback):
    """After each logged step, that is after everything the trainer does for it."""

    def __init__(self, lines: Any) -> None:
        self.lines = lines

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.lines.pause({"step": state.global_step, "loss": float(logs["loss"])})


class _SameRows(SFTTrainer):
    """Only what is in a batch is ours: `batches` are lists of indices."""

    batches: list[list[int]]

    def get_train_dataloader(self) -> Any:
        dataset = self._remove_unused_columns(self.train_dataset, description="training")
        loader = DataLoader(dataset, batch_sampler=self.batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def _parts(indices: list[int], count: int) -> list[list[int]]:
    """Divide indices into `count` runs of about the same length."""
    bounds = [round(i * len(indices) / count) for i in range(count + 1)]
    return [indices[start:stop] for start, stop in itertools.pairwise(bounds)]


def _documents(spec: dict[str, Any]) -> tuple[list[dict[str, Any]], list[list[int]], int]:
    """Examples, batches, and batches in an optimiser step."""
    recipe = make_recipe(Path(spec["folder"]), spec["length"])
    size, packing = recipe.train.global_batch_size, spec["packing"]
    rows = packed_rows(recipe, spec["steps"])
    examples: list[dict[str, Any]] = []
    steps: list[list[int]] = []
    for start in range(0, len(rows), size):
        begin = len(examples)
        for row in rows[start : start + size]:
            ids, lengths = row.input_ids.tolist(), row.doc_lens.tolist()
            if packing:
                examples.append({"input_ids": ids, "labels": ids, "seq_lengths": lengths})
                continue
            ends = list(itertools.accumulate(lengths, initial=0))
            examples += [{"input_ids": ids[a:b], "labels": ids[a:b]} for a, b in itertools.pairwise(ends)]
        steps.append(list(range(begin, len(examples))))
    # Batches of a fixed number of documents would not hold the documents of a packed step; the nearest number of
    # batches a step does, and their size is the one asked for but for a document more or less.
    accumulation = max(1, round(len(examples) / len(steps) / spec["batch"]))
    return examples, [part for step in steps for part in _parts(step, accumulation)], accumulation


def run(spec: dict[str, Any], lines: Any) -> None:
    """Train until the driver stops asking."""
    disable_progress_bars()
    base = Path(spec["folder"]) / "base"
    examples, batches, accumulation = _documents(spec)
    lines.ready()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = SFTConfig(
        output_dir=f"{spec['folder']}/trl",
        max_steps=spec["steps"],
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=accumulation,
        max_length=spec["length"],
        packing=spec["packing"],
        bf16=spec["bf16"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        **({} if spec["checkpointing"] else {"gradient_checkpointing": False}),
    )
    trainer = _SameRows(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[_Paused(lines)],
    )
    trainer.batches = batches
    trainer.train()
