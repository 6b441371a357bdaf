"""Random-weight Llamas of known shapes, and rows of random documents."""

from typing import Any

import torch

from ftray.data.batch import Batch

_LLAMA: dict[str, Any] = {"max_position_embeddings": 8192, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "3b": _LLAMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": _LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}
"""Shapes of Llama 3.1 8B, Llama 3.2 3B and 1B; full fine-tuning takes 16 bytes a parameter before activations."""


def build(shape: str, *, dtype: torch.dtype, attn: str, device: str) -> Any:
    """A random-weight model, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
    model.config.use_cache = False
    return model.train()


def row(shape: str, tokens: int, seed: int, device: str) -> Batch:
    """One row of documents of 1/16 to 1/2 of it, every token a target but each document's first."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        length = int(torch.randint(max(2, tokens // 16), tokens // 2, (1,), generator=generator))
        lengths.append(min(length, left))
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (1, tokens), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = torch.where(positions == 0, -100, ids)
    return Batch(
        input_ids=ids,
        labels=labels,
        weights=(labels != -100).float(),
        position_ids=positions,
        cu_seq_lens=torch.tensor([0, *lengths]).cumsum(0).int(),
        group_lens=torch.ones(len(lengths), dtype=torch.int32),
        row_ids=torch.tensor([0]),
    ).to(device)


def step_flops(shape: str, batch: Batch, parameters: int) -> float:
    """Floating-point operations of full training: 6 a parameter and token, and causal attention's."""
    config = SHAPES[shape]
    squares = float(batch.cu_seq_lens.diff().double().square().sum())
    return (
        6 * parameters * batch.num_tokens + 6 * config["num_hidden_layers"] * config["hidden_size"] * squares
    )
