"""What all arms share: real text, a tokenizer, a 25M Llama with random weights, recipes, FLOPs."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.corpus import texts
from ftray.config.recipe import Recipe
from ftray.core.spec import parse
from ftray.data.prepare import prepare_local
from ftray.data.read import RowArrays
from ftray.data.train_tokenizer import train_tokenizer
from ftray.train.feed import Feed

VOCABULARY = 16384
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1344,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}
"""25.5 million parameters, 8.4 of them the embedding, which is the head too."""
LEARNING_RATE = 1e-3
STEP_TOKENS = 4096
"""Tokens of one optimiser step: a global batch is this many, whatever the length of a row."""
_FORWARD_TOKENS = 512
"""Tokens of one of our forward passes: 1,024 are faster by a few per cent and hold more activations."""
_CORPUS_BYTES = 6 << 20
_LEAST_CHARACTERS = 200


def prepare_folder(folder: Path) -> None:
    """Write texts, tokenizer and base model into a folder, unless they are there."""
    if (folder / "base" / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = texts()
    _write(folder / "short.jsonl", _sections(found))
    _write(folder / "long.jsonl", found)
    if not (folder / "base").exists():
        train_tokenizer([str(folder / "long.jsonl")], folder / "base", VOCABULARY)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA), dtype=torch.float32).save_pretrained(
        folder / "base"
    )


def _sections(documents: Sequence[str]) -> Iterator[str]:
    """Top-level definitions and sections: rows as fine-tuning knows them, most of them short."""
    for document in documents:
        yield from (part for part in document.split("\n\n\n") if len(part) >= _LEAST_CHARACTERS)


def _write(path: Path, documents: Sequence[str] | Iterator[str]) -> None:
    written = 0
    with path.open("w") as file:
        for text in documents:
            written += file.write(json.dumps({"text": text}) + "\n")
            if written > _CORPUS_BYTES:
                return


def make_recipe(folder: Path, length: int, **changes: Any) -> Recipe:
    """The run of an arm; `changes` are sections to merge, `train={"bf16": False}`."""
    tree: dict[str, Any] = {
        "name": "bench",
        "output_dir": str(folder / "runs"),
        "model": {"model_name_or_path": str(folder / "base")},
        "data": {
            "train": [str(folder / ("short.jsonl" if length <= 512 else "long.jsonl"))],
            "transforms": [],
            "max_length": length,
            "cache_dir": str(folder / "cache"),
        },
        "adapt": {"type": "full"},
        "objective": "lm",
        "optim": {"type": "adamw", "learning_rate": LEARNING_RATE},
        "lr_scheduler": "constant",
        "strategy": {"type": "single"},
        "train": {
            "max_steps": 100_000,
            "global_batch_size": STEP_TOKENS // length,
            "per_device_train_batch_size": max(1, _FORWARD_TOKENS // length),
            "bf16": True,
        },
    }
    for section, values in changes.items():
        tree[section] = tree[section] | values if isinstance(values, dict) else values
    return parse(Recipe, tree)


def packed_rows(recipe: Recipe, steps: int) -> list[RowArrays]:
    """The rows of a recipe's first steps, in the order in which our arm takes them."""
    shards = prepare_local(recipe.data, recipe.model.tokenizer, "train")
    feed = Feed(
        shards,
        None,
        recipe.strategy,
        recipe.data,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=1,
        seed=recipe.seed,
    )
    return [feed.shards.row(int(index)) for step in range(steps) for index in feed.rows(step)]


def step_flops(rows: Sequence[RowArrays], parameters: int) -> float:
    """Floating-point operations of one training step: 6 a parameter and token, and causal attention's.

    Attention multiplies twice (scores, values) at `length / 2` keys a query on average, forward once and backward
    twice: `6 * layers * hidden * length**2` a document (Chowdhery et al., arXiv:2204.02311, with the causal half).
    """
    squares = sum(int(length) ** 2 for row in rows for length in row.doc_lens)
    attention = 6 * LLAMA["num_hidden_layers"] * LLAMA["hidden_size"] * squares
    return float(6 * parameters * sum(len(row.input_ids) for row in rows) + attention)
