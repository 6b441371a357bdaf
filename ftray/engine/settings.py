"""Settings that engines over a Hugging Face model share."""

from typing import Any, Literal

import torch
from pydantic import Field

from ftray.core.spec import spec
from ftray.model.folder import resolve_folder
from ftray.model.tokenizer import load_tokenizer


@spec
class ModelEngineConfig:
    """What is loaded, where it runs and how much it may hold."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the base's weights and of the key-value cache."""
    device: str = "auto"
    """`cpu`, `cuda` or a torch device; `auto` takes CUDA where there is one."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of a step; null: as torch finds them."""
    kv_cache_tokens: int = Field(default=32768, ge=16)
    """Tokens whose keys and values are held, over all running requests."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of a prompt and its answer; null: what model and cache allow."""

    max_loras: int = Field(default=32, ge=0)
    """Deltas in place at once, so that many can be in use in one step; any number may be known. 0: no limit."""
    max_cpu_loras: int = Field(default=256, ge=0)
    """Deltas kept in memory beside those in place; the others are read from disk when they are asked for."""
    max_own_weights: int = Field(default=1, ge=0)
    """Deltas in place at once that can share no batch (replacement weights, PEFT's kinds but plain LoRA). Each is a
    whole set of weights and answers in steps of its own; one more may be in memory, that waits. 0 refuses them."""

    def load_tokenizer(self, base: str) -> Any:
        """The base's tokenizer."""
        return load_tokenizer(resolve_folder(base))

    def use_threads(self) -> None:
        """Let torch compute with the threads asked for."""
        if self.num_threads:
            torch.set_num_threads(self.num_threads)


def pick_device(name: str) -> torch.device:
    """The torch device of a `device` setting."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
