"""The base's tokenizer and the identity of its chat template."""

from pathlib import Path
from typing import Any

from ftray.core.errors import ModelError
from ftray.data.tokenise import chat_template_hash

__all__ = ["chat_template_hash", "load_tokenizer"]


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a model folder or Hub id.

    Raises:
        ModelError: if there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{folder}: no usable tokenizer here ({reason}); set `tokenizer_name_or_path`"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no `eos_token`; add one to tokenizer_config.json")
    return tokenizer
