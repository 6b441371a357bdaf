"""A scalar head beside the language model's own, in the layout of transformers' sequence classification."""

import copy
import hashlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from ftray.core.errors import ModelError

HEAD = "score"
"""The head's name, as in transformers' `...ForSequenceClassification`."""


def add_score_head(model: Any, seed: int) -> None:
    """Give a causal language model a trainable `score` over hidden states, `[1, D]`, and freeze its unused head.

    The head starts as transformers starts it, from a seed of its own, whatever else the model holds.

    Raises:
        ModelError: if transformers has no classifier of this architecture, so that nothing could load the result.
    """
    if type(model.config) not in AutoModelForSequenceClassification._model_mapping:
        raise ModelError(
            f"model_type {model.config.model_type!r}: transformers has no sequence classifier of it; "
            "take another base"
        )
    text = model.config.get_text_config()
    with torch.device("cpu"):
        head = nn.Linear(text.hidden_size, 1, bias=False)
    digest = hashlib.sha256(f"{seed}:{HEAD}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    std = getattr(text, "initializer_range", 0.02)
    with torch.no_grad():
        head.weight.copy_(torch.empty(head.weight.shape).normal_(0.0, std, generator=generator))
    model.score = head
    output = model.get_output_embeddings()
    if output.weight is not model.get_input_embeddings().weight:
        output.requires_grad_(False)


def score_head(model: Any) -> nn.Linear | None:
    """The head of a model that has one."""
    head: nn.Linear | None = getattr(model, HEAD, None)
    return head


def task_type(model: Any) -> str:
    """PEFT's name of what the model is for."""
    return "CAUSAL_LM" if score_head(model) is None else "SEQ_CLS"


def saved_config(model: Any) -> Any:
    """The configuration to save a model with: of a classifier with one label if it has a score head."""
    config = copy.deepcopy(model.config)
    # Our attention's name means nothing to plain transformers; the saved folder must load there.
    config._attn_implementation = "sdpa"
    if score_head(model) is not None:
        config.num_labels = 1
        classifier: Any = AutoModelForSequenceClassification._model_mapping[type(config)]
        config.architectures = [classifier.__name__]
    return config


def is_saved(model: Any, name: str) -> bool:
    """False for the parameters of a language model head that a classifier has no place for."""
    if score_head(model) is None:
        return True
    output = model.get_output_embeddings()
    heads = [key for key, module in model.named_modules() if module is output]
    return not any(name.startswith(head + ".") for head in heads)
