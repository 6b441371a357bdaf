"""One optimiser step, ours and the peers', as functions from a batch to a loss."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.shapes import build
from ftray.adapt.full import Full
from ftray.adapt.lora import LoRA
from ftray.data.batch import Batch
from ftray.model.attention import NAME
from ftray.model.policy import Policy
from ftray.objective.lm import SupervisedFineTuning
from ftray.optim.adamw import AdamW
from ftray.optim.first_order import FirstOrder
from ftray.strategy.single import Single

Step = Callable[[Batch], float]
_RATE = 1e-5


def compile_layers(model: Any) -> None:
    """Compile each layer by itself: one graph serves them all, whatever the lengths of documents are."""
    for module in model.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            module.compile(dynamic=False)


def checkpoint_layers(model: Any) -> None:
    """Compute layers again in the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


def ours(shape: str, *, lora: bool, device: str, compiled: bool, checkpointing: bool) -> tuple[Any, Step]:
    """Our engine with `single`: registered attention, chunked cross-entropy, fused AdamW."""
    dtype = torch.bfloat16 if lora else torch.float32
    model = build(shape, dtype=dtype, attn=NAME, device=device)
    model.requires_grad_(False)
    (LoRA(r=16) if lora else Full()).apply(model, 0)
    if checkpointing:
        checkpoint_layers(model)
    if compiled:
        compile_layers(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = AdamW(learning_rate=_RATE).build(parameters)
    engine = FirstOrder(
        Policy(model), SupervisedFineTuning(), Single(), parameters, optimizers, max_grad_norm=1.0, bf16=True
    )
    return model, lambda batch: engine.step([batch], 1.0).loss


def hugging_face(
    shape: str, *, lora: bool, device: str, compiled: bool, checkpointing: bool
) -> tuple[Any, Step]:
    """transformers, with PEFT for LoRA: padding-free rows, its best attention that is installed, its own loss."""
    dtype = torch.bfloat16 if lora else torch.float32
    model = build(shape, dtype=dtype, attn=_best_attention(device), device=device)
    if lora:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    if checkpointing:
        checkpoint_layers(model)
        if lora:
            model.enable_input_require_grads()
    if compiled:
        compile_layers(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, fused=True, weight_decay=0.0)

    def step(batch: Batch) -> float:
        with torch.autocast(device, torch.bfloat16):
            loss = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                labels=batch.labels,
                use_cache=False,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return model, step


def _best_attention(device: str) -> str:
    """Flash attention if it is installed: it alone takes padding-free rows without a mask of the whole row."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"


ARMS = {"ours": ours, "hf": hugging_face}
