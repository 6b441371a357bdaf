"""Facts about a base that engines need, and the check that a delta belongs to it."""

from pathlib import Path
from typing import Any

from ftray.adapt.lora import LoRALinear, load_adapter, unload_adapter
from ftray.core.errors import DeltaError
from ftray.delta import manifest
from ftray.engine.api import EngineInfo
from ftray.engine.scheduler import Scheduler
from ftray.model.identity import base_identity
from ftray.model.positions import max_positions
from ftray.model.tokenizer import chat_template_hash
from ftray.registry.local import VERSION_FILE

__all__ = ["DeltaGate", "attention_span", "engine_info", "eos_ids", "load_checked", "max_positions"]


def attention_span(config: Any) -> int:
    """The widest window or chunk a layer attends within; 0 if all layers see everything."""
    text = config.get_text_config()
    spans = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return max([int(span) for span in spans if span], default=0)


def eos_ids(folder: Path, config: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, by the tokenizer, the configuration and the generation settings."""
    from transformers import GenerationConfig

    found = [tokenizer.eos_token_id, config.get_text_config().eos_token_id]
    if (folder / "generation_config.json").is_file():
        found.append(GenerationConfig.from_pretrained(folder).eos_token_id)
    ids: set[int] = set()
    for item in found:
        ids |= set(item) if isinstance(item, list | tuple) else {item}
    return ids - {None}


class DeltaGate:
    """Refuses what does not belong to a base: another base's or chat template's delta, damaged files."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.identity = base_identity(folder)
        self.template_hash = chat_template_hash(tokenizer)

    def check(self, folder: Path) -> None:
        """Check a delta folder; one without a manifest is a plain PEFT adapter, checked by its shapes alone.

        Raises:
            DeltaError: one line.
        """
        if not (folder / manifest.MANIFEST).is_file():
            return
        delta = manifest.read(folder, beside=frozenset({VERSION_FILE}))
        if delta.kind != "low_rank":
            raise DeltaError(f"{folder}: a {delta.kind} delta cannot share a base; serve it as a base")
        try:
            manifest.check_base(delta, self.identity)
        except DeltaError as error:
            raise DeltaError(f"{folder}: {error}") from None
        if delta.chat_template_hash and delta.chat_template_hash != self.template_hash:
            raise DeltaError(
                f"{folder}: trained under chat template {delta.chat_template_hash}, this base has"
                f" {self.template_hash}; serve it with the tokenizer it was trained with"
            )


def load_checked(model: Any, gate: DeltaGate | None, key: str, folder: str) -> None:
    """Load an adapter if it belongs to the model's base. Raises `DeltaError`, leaving nothing behind."""
    path = Path(folder)
    if gate:
        gate.check(path)
    load_adapter(model, key, path)
    head = model.get_output_embeddings()
    if isinstance(head, LoRALinear) and key in head.scaling:
        unload_adapter(model, key)
        # The head sees the last tokens only, so a mixed batch's stretches do not fit it.
        raise DeltaError(f"{folder}: it adapts the output head, which is not served; train without `lm_head`")


def engine_info(engine: str, gate: DeltaGate, scheduler: Scheduler) -> EngineInfo:
    """Facts to report about an engine over a base."""
    return EngineInfo(
        engine=engine,
        base=gate.identity["name"],
        base_digest=gate.identity["digest"],
        chat_template_hash=gate.template_hash,
        max_length=scheduler.max_length,
    )
