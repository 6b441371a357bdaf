"""Deltas made of random numbers, and what plain transformers and PEFT answer under them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftray.delta import manifest
from ftray.delta.algebra import Parent

IDS = torch.randint(2, 250, (2, 24), generator=torch.Generator().manual_seed(3))
ARCHITECTURES = ["llama", "gemma3", "gpt2"]
Calculate = Callable[..., Path]


def parent(folder: Path) -> Parent:
    return Parent(folder, manifest.read(folder))


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


@torch.no_grad()
def delta_logits(base: Path, folder: Path) -> torch.Tensor:
    """Logits under a delta folder, loaded by plain PEFT or plain transformers."""
    if manifest.read(folder).kind == "replacement":
        return logits(plain(folder))
    return logits(PeftModel.from_pretrained(plain(base), str(folder)).eval())
