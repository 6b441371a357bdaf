"""The engine for models that do not go through the paged attention: Hugging Face's own attention and cache.

One forward pass a request: slower than a shared one, but right for every model that transformers runs.
"""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from ftray.adapt.lora_files import put_adapter, unload_adapter
from ftray.adapt.route import Route
from ftray.core.spec import spec
from ftray.engine.api import Request
from ftray.engine.base import (
    DeltaGate,
    DeltaReader,
    LowRank,
    declared_positions,
    engine_info,
    eos_ids,
    max_positions,
)
from ftray.engine.core import StepEngine
from ftray.engine.own import OwnReader, OwnWeights
from ftray.engine.scheduler import Row, Scheduler, Sequence
from ftray.engine.selfcheck import RELATIVE_TOLERANCE
from ftray.engine.settings import ModelEngineConfig, pick_device
from ftray.model.build import NotBuiltError, load_model
from ftray.model.folder import resolve_folder
from ftray.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ftray.engine.torch_engine import TorchEngineConfig

logger = logging.getLogger(__name__)


class HFRunner:
    """Computes each row alone, with a cache object of its own."""

    def __init__(self, model: Any, reader: DeltaReader) -> None:
        self.model = model
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.use_cache = True
        self._reader = reader
        self._own: dict[str, Any] = {}
        # Some change all positions' factors beyond this length, so what was kept of a shorter text is of no use.
        self._turn = max_positions(model.config)
        self._device = next(model.parameters()).device
        self._route = model.ftray_route = getattr(model, "ftray_route", None) or Route()
        self._caches: dict[Sequence, Any] = {}

    @torch.inference_mode()
    def forward(self, rows: list[Row], keys: list[str | None], keep: list[int]) -> torch.Tensor:
        """See `Runner.forward`."""
        wanted, first, kept = set(keep), 0, []
        for row, key in zip(rows, keys, strict=True):
            model = self.model if key is None else self._own.get(key, self.model)
            with self._route.use(active=key):
                logits = self._row(row, model)
            kept += [logits[at] for at in range(row.length) if first + at in wanted]
            first += row.length
        return torch.stack(kept) if kept else torch.empty(0)

    def check_cache(self) -> None:
        """Give up the cache, and compute every sequence anew each step, where it changes the logits.

        Some architectures keep their state elsewhere and take no notice of the cache they are handed.
        """
        seq = Sequence(Request(id="check", prompt_ids=[]), 0, list(range(3, 15)))
        cached: list[torch.Tensor] = []
        with torch.inference_mode():
            try:
                cached = [
                    self._row(Row(seq, start, length), self.model)
                    for start, length in ((0, 7), (7, 4), (11, 1))
                ]
            except (TypeError, ValueError, AttributeError) as error:
                logger.warning("no key-value cache for this model: %s", error)
            self.release(seq)
            self.use_cache = False
            plain = self._row(Row(seq, 0, len(seq.tokens)), self.model).float()
        if cached:
            difference = (torch.cat(cached).float() - plain).abs().max() / max(1.0, float(plain.abs().max()))
            self.use_cache = bool(difference <= RELATIVE_TOLERANCE[self.model.dtype])

    def _row(self, row: Row, model: Any) -> torch.Tensor:
        from transformers import DynamicCache

        start, stop = row.start, row.start + row.length
        if not self.use_cache or start <= self._turn < stop:
            start = 0
        ids = torch.tensor([row.seq.tokens[start:stop]], device=self._device)
        if not self.use_cache:
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
            return logits[-row.length :]
        if start == 0:
            self._caches[row.seq] = DynamicCache(config=model.config)
        logits = model(input_ids=ids, past_key_values=self._caches[row.seq], use_cache=True).logits[0]
        return logits[-row.length :]

    def release(self, seq: Sequence) -> None:
        """Drop the sequence's cache."""
        self._caches.pop(seq, None)

    def read(self, folder: str) -> LowRank:
        """See `Places.read`."""
        return self._reader.read(folder)

    def read_own(self, folder: str) -> OwnWeights:
        """See `Places.read_own`."""
        return self._reader.read_own(folder)

    def load(self, key: str, delta: LowRank | OwnWeights) -> None:
        """See `Places.load`."""
        if isinstance(delta, OwnWeights):
            self._own[key] = delta.model.to(self._device)
        else:
            put_adapter(self.model, key, delta.adapter)

    def unload(self, key: str) -> None:
        """See `Places.unload`."""
        self._own.pop(key, None)
        unload_adapter(self.model, key)


@spec
class HFGenerateConfig(ModelEngineConfig):
    """Settings of the plain Hugging Face engine."""

    max_num_seqs: int = Field(default=8, ge=1)
    """Requests that run at once, in turns."""

    def build(self, base: str) -> StepEngine:
        """Load a base and return an engine over it."""
        self.use_threads()
        folder = resolve_folder(base)
        model = _load(folder, self.dtype).to(pick_device(self.device))
        tokenizer = load_tokenizer(folder)
        gate = DeltaGate(folder, tokenizer)
        positions = declared_positions(model.config)
        scheduler = Scheduler(
            max_num_seqs=self.max_num_seqs,
            # A prompt is one forward pass of its own, so there is nothing to gain from cutting it up.
            max_batch_tokens=max(positions, self.max_num_seqs) * self.max_num_seqs,
            num_blocks=self.kv_cache_tokens,
            block_size=1,
            max_length=min(self.max_length or positions, positions, self.kv_cache_tokens),
        )
        info = engine_info("hf_generate", gate, scheduler, self.max_loras)
        ends = eos_ids(folder, model.config, tokenizer)
        own = OwnReader(folder, model) if self.max_own_weights else None
        runner = HFRunner(model, DeltaReader(model, gate, own))
        runner.check_cache()
        host, own_weights = self.max_cpu_loras, self.max_own_weights
        return StepEngine(runner, tokenizer, scheduler, info, ends, max_host=host, max_own=own_weights)


def _load(folder: Any, dtype: str) -> Any:
    try:
        return load_model(folder, dtype=dtype, attn="sdpa")
    except (NotBuiltError, ImportError):  # how transformers says that a model has no such attention
        return load_model(folder, dtype=dtype, attn="eager")


def build_fallback(config: "TorchEngineConfig", base: str) -> StepEngine:
    """This engine with the settings that another was given."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelEngineConfig)}
    return HFGenerateConfig(max_num_seqs=config.max_num_seqs, **shared).build(base)
