"""Training functions and rewards of a user's own, and some that make mistakes."""

from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ftray.train.opaque.context import Context


def many_digits(completions: list[str], **_: Any) -> list[float]:
    """Share of digits in a completion."""
    return [sum(char.isdigit() for char in text) / max(1, len(text)) for text in completions]


def fine_tune(context: Context) -> None:
    """A plain loop over this worker's rows: PEFT, PyTorch, gradients averaged over the workers."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(context.model_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step, row in zip(range(1, 7), context.rows(), strict=False):
        ids = context.tokenizer(row["prompt"] + row["completion"], return_tensors="pt").input_ids
        loss = model(ids, labels=ids).loss
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None and context.world_size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= context.world_size
        optimizer.step()
        optimizer.zero_grad()
        context.log(step, loss=loss.item(), row=row["prompt"])
    if context.rank == 0:
        model.save_pretrained(context.output_dir)


def whole_model(context: Context) -> None:
    """Changes one weight and saves everything."""
    model = AutoModelForCausalLM.from_pretrained(context.model_dir, dtype=torch.float32)
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(context.output_dir)
    context.log(1, loss=1.0)


def nothing(context: Context) -> None:
    """Leaves nothing behind."""
    context.log(1, loss=1.0)


def too_large(context: Context) -> None:
    """Wants more memory than any machine has."""
    torch.empty(1 << 50)


not_a_function = 3
