"""Facts about a base that engines need, and the check that a delta belongs to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.adapt.lora_files import Adapter, AdapterSites
from ftray.adapt.peft_files import OtherKindError
from ftray.core.errors import DeltaError
from ftray.delta import manifest
from ftray.engine.api import EngineInfo
from ftray.engine.gate import DeltaGate, folder_digest
from ftray.engine.own import OwnReader, OwnWeights
from ftray.engine.places import OwnWeightsError
from ftray.engine.scheduler import Scheduler
from ftray.model.positions import max_positions

__all__ = [
    "DeltaGate",
    "DeltaReader",
    "LowRank",
    "attention_span",
    "declared_positions",
    "engine_info",
    "eos_ids",
    "kv_facts",
    "max_positions",
]


def declared_positions(config: Any) -> int:
    """Most tokens a model takes by its own account, though rows of a batch may then depend on each other."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


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


@dataclass(frozen=True)
class LowRank:
    """A low-rank delta in memory: rows under different ones share a forward pass."""

    digest: str
    """Digest of what answers."""
    adapter: Adapter
    """Its factors."""
    kind: str = "low_rank"
    mixed_batch: bool = True

    @property
    def size_bytes(self) -> int:
        """Of the factors."""
        return self.adapter.size_bytes


class DeltaReader:
    """Reads deltas of one base; looks at the model when it is made and never again, so it may run beside steps.

    Args:
        model: the base.
        gate: refuses what belongs to another; None: nothing is asked.
        own: reads what cannot share a batch; None: that is refused.
    """

    def __init__(self, model: Any, gate: DeltaGate | None, own: OwnReader | None = None) -> None:
        self._sites = AdapterSites(model)
        self._gate = gate
        self._own = own
        head = model.get_output_embeddings()
        self._head = next((name for name, module in model.named_modules() if module is head), None)

    def read(self, folder: str) -> LowRank:
        """A low-rank delta that belongs to the base; see `Places.read`."""
        path = Path(folder)
        delta = self._gate.check(path) if self._gate else None
        try:
            return self._low_rank(path, delta)
        except OtherKindError as error:
            if self._own is None:
                raise DeltaError(f"{error}, or allow it weights of its own (`max_own_weights`)") from None
            raise OwnWeightsError(str(error)) from None

    def read_own(self, folder: str) -> OwnWeights:
        """A delta of another kind that belongs to the base; see `Places.read_own`."""
        assert self._own is not None
        path = Path(folder)
        delta = self._gate.check(path) if self._gate else None
        return self._own.read(path, delta, delta.digest if delta else folder_digest(path))

    def _low_rank(self, folder: Path, delta: manifest.Delta | None) -> LowRank:
        if delta is not None and delta.kind != "low_rank":
            raise OtherKindError(f"{folder}: a {delta.kind} delta shares no batch; extract a low-rank one")
        adapter = self._sites.read(folder)
        if self._head in adapter.factors:
            # The head sees the last tokens only, so a mixed batch's stretches do not fit it.
            raise OtherKindError(f"{folder}: it adapts the output head; train without `{self._head}`")
        return LowRank(delta.digest if delta else folder_digest(folder), adapter)


def kv_facts(model: Any) -> str:
    """What keys and values depend on besides weights and tokens."""
    text = model.config.get_text_config()
    rope = json.dumps(getattr(text, "rope_parameters", None), sort_keys=True, default=str)
    return f"{model.dtype} {rope}"


def engine_info(engine: str, gate: DeltaGate, scheduler: Scheduler, max_slots: int) -> EngineInfo:
    """Facts to report about an engine over a base."""
    return EngineInfo(
        engine=engine,
        base=gate.identity["name"],
        base_digest=gate.identity["digest"],
        chat_template_hash=gate.template_hash,
        max_length=scheduler.max_length,
        max_slots=max_slots,
    )
