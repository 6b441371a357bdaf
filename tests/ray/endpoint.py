"""What tests of an endpoint put into it and ask of it."""

from pathlib import Path
from typing import Any

import openai

from ftray.config.serve import ServeConfig
from ftray.core.spec import replace
from ftray.delta import manifest
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer
from ftray.registry.registry import Registry

ASK: list[Any] = [{"role": "user", "content": "What is this?"}]


def publish(base: Path, adapters: dict[str, Path], root: Path) -> Registry:
    """A registry of adapters as deltas of a base."""
    registry = Registry(root)
    template = chat_template_hash(load_tokenizer(base))
    for name, folder in adapters.items():
        if not (folder / manifest.MANIFEST).exists():
            manifest.write(folder, kind="low_rank", base=base_identity(base), chat_template_hash=template)
        registry.publish(folder, name)
    return registry


def without_keys(config: ServeConfig) -> ServeConfig:
    """The same without keys."""
    return replace(replace(config, "metrics_key_sha256", None), "tenants", [])


def ask(client: openai.OpenAI, model: str, **settings: Any) -> str:
    """What a model answers to the question."""
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 24} | settings
    reply = client.chat.completions.create(model=model, messages=ASK, **fields)
    if fields.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
    return reply.choices[0].message.content or ""
