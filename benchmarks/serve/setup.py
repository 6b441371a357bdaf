"""What all arms share: prompts out of the standard library, random-weight Llamas, adapters in PEFT's format."""

import ast
import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.gpu.shapes import SHAPES as LARGE
from ftray.adapt.peft_files import CONFIG, PREFIX, WEIGHTS
from ftray.data.train_tokenizer import train_tokenizer
from ftray.model.tokenizer import load_tokenizer

VOCABULARY = 16384
RANK = 16
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}
SHAPES: dict[str, dict[str, Any]] = {
    "40m": _LLAMA
    | {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "235m": _LLAMA
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
"""40.4 and 234.9 million parameters, the input and the output embedding among them."""
_GPU_SHAPES = {
    name: _LLAMA
    | LARGE[name]
    # With one random matrix at both ends, a model says its last token again whatever its adapter.
    | {"vocab_size": max(VOCABULARY, LARGE[name]["vocab_size"]), "tie_word_embeddings": False}
    for name in ("1b", "8b", "tiny")
}
_LEAST_TOKENS, _MOST_TOKENS = 16, 192


@dataclass(frozen=True)
class Prompt:
    """A prompt and the adapter that answers it; None: the base."""

    ids: list[int]
    adapter: str | None


class Setup:
    """A folder with the tokenizer, and bases and adapters as they are asked for.

    Args:
        folder: where they are.
        dtype: of the bases' weights.
        device: where random weights are drawn.
    """

    def __init__(self, folder: Path, dtype: str, device: str = "cpu") -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self._ids: list[list[int]] = []

    def base(self, shape: str) -> Path:
        """A base model folder with random weights, saved in the type it is served in."""
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = self.folder / f"base-{shape}-{self.dtype}"
        if not (folder / "config.json").is_file():
            load_tokenizer(self._tokenizer()).save_pretrained(folder)
            torch.manual_seed(0)
            config = AutoConfig.for_model(**shape_of(shape))
            with torch.device(self.device):
                model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
            model.save_pretrained(folder)
        return folder

    def adapters(self, shape: str, count: int) -> dict[str, Path]:
        """Folders of adapters of rank 16 on every linear layer, both factors random."""
        return {f"a{number}": self._adapter(shape, number) for number in range(count)}

    def prompts(self, count: int, adapters: list[str | None]) -> list[Prompt]:
        """Docstrings of the standard library, each with the next adapter of the list in turn."""
        if not self._ids:
            tokenizer = load_tokenizer(self._tokenizer())
            encoded = [tokenizer.encode(text)[:_MOST_TOKENS] for text in docstrings()]
            self._ids = [ids for ids in encoded if len(ids) >= _LEAST_TOKENS]
        return [Prompt(self._ids[number], adapters[number % len(adapters)]) for number in range(count)]

    def _tokenizer(self) -> Path:
        folder = self.folder / "tokenizer"
        if not folder.exists():
            corpus = self.folder / "docs.jsonl"
            corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in docstrings()))
            train_tokenizer([str(corpus)], folder, VOCABULARY)
        return folder

    def _adapter(self, shape: str, number: int) -> Path:
        folder = self.folder / f"adapters-{shape}-{self.dtype}" / f"a{number}"
        if (folder / CONFIG).is_file():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        generator, dtype = torch.Generator().manual_seed(number), getattr(torch, self.dtype)
        tensors = {}
        for name, (rows, columns) in linear_shapes(shape).items():
            a, b = (
                torch.randn(RANK, columns, generator=generator),
                torch.randn(rows, RANK, generator=generator),
            )
            tensors[f"{PREFIX}{name}.lora_A.weight"] = (a * columns**-0.5).to(dtype)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (b * 0.02).to(dtype)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": sorted({name.rpartition(".")[2] for name in linear_shapes(shape)}),
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(config))
        return folder


def shape_of(name: str) -> dict[str, Any]:
    """Fields of a base's configuration."""
    return (SHAPES | _GPU_SHAPES)[name]


def linear_shapes(shape: str) -> dict[str, tuple[int, int]]:
    """Name -> (rows, columns) of every linear layer but the output head."""
    config = shape_of(shape)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{layer}.{name}": size for layer in layers for name, size in block.items()}


def docstrings() -> list[str]:
    """Docstrings of this Python's library, in an order that is the same everywhere it is the same library."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        found += [text for node in nodes if (text := ast.get_docstring(node)) and len(text) >= 60]
    random.Random(0).shuffle(found)
    return found
