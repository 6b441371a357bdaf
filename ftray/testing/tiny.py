"""Tiny models with random weights, saved as ordinary Hugging Face folders: real in every part but the size."""

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '<|end|>' }}"
    "{% else %}{{ m['content'] }}{% if m['role'] == 'user' %}{{ '\\n# Answer:' }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
)

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough that greedy decoding of a random model is not one token for ever.
    "initializer_range": 0.15,
}

_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SMALL, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_SMALL, "head_dim": 16, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", **_SMALL, "head_dim": 16, "sliding_window": 9},
    "gemma3": {
        "model_type": "gemma3_text",
        **_SMALL,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"model_type": "phi3", **_SMALL, "sliding_window": 9},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SMALL,
        "head_dim": 16,
        **_EXPERTS,
        "moe_intermediate_size": 32,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": 0.15,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


def byte_tokenizer(folder: Path) -> Any:
    """Save a byte-level tokenizer (258 tokens: 256 bytes, `<|end|>`, `<|pad|>`) with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, "<|pad|>": 1} | {char: i + 2 for i, char in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>", "<|pad|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_base(folder: Path, architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny random causal language model with its tokenizer; returns the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    byte_tokenizer(folder)
    settings = ARCHITECTURES[architecture] | overrides
    config = AutoConfig.for_model(
        **{"vocab_size": 258, **settings}, eos_token_id=0, pad_token_id=1, bos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def random_adapter(
    base: Path,
    folder: Path,
    *,
    r: int = 4,
    seed: int = 1,
    scale: float = 0.2,
    target_modules: str | list[str] = "all-linear",
    **settings: Any,
) -> Path:
    """Save a LoRA adapter made by `peft` with both factors random, so that it changes every answer.

    `settings` are further fields of PEFT's `LoraConfig`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=target_modules, task_type="CAUSAL_LM", **settings
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    peft_model.save_pretrained(str(folder))
    return folder
