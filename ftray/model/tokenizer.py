"""The base's tokenizer and the identity of its chat template."""

from pathlib import Path
from typing import Any

from ftray.core.errors import ModelError
from ftray.core.fs import digest_bytes, digest_json


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


def chat_template_hash(tokenizer: Any) -> str:
    """Digest of the chat template's bytes; `none` if the tokenizer has no template."""
    template = tokenizer.chat_template
    if not template:
        return "none"
    return digest_bytes(template.encode()) if isinstance(template, str) else digest_json(template)
