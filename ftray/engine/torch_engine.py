"""The engine: continuous batching of many deltas over one Hugging Face model graph.

Tokens of all rows stand on one axis without padding. Each row's attention goes through the paged cache, each
stretch of rows of one delta through its adapter. At load the engine checks itself against the plain model and
falls back, saying so, to one request at a time where the model does not take part.
"""

import dataclasses
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ftray.adapt.lora_files import Adapter, put_adapter, unload_adapter
from ftray.adapt.lora_linear import route_of
from ftray.adapt.route import Segment
from ftray.core.errors import ConfigError, FtrayError
from ftray.core.spec import spec
from ftray.engine import paged
from ftray.engine.api import Request
from ftray.engine.base import (
    DeltaGate,
    DeltaReader,
    LowRank,
    declared_positions,
    engine_info,
    eos_ids,
    kv_facts,
    max_positions,
)
from ftray.engine.core import StepEngine
from ftray.engine.layout import segments_of
from ftray.engine.lora_slots import Pair, Stretches
from ftray.engine.own import OwnReader, OwnWeights
from ftray.engine.pace import Pace
from ftray.engine.scheduler import Row, Scheduler, Sequence
from ftray.engine.selfcheck import self_check
from ftray.engine.settings import ModelEngineConfig, pick_device
from ftray.engine.swap import Placed, Swapped
from ftray.model.build import NotBuiltError, load_model
from ftray.model.folder import load_config, resolve_folder
from ftray.model.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlotDelta:
    """A low-rank delta in memory, its factors as the slots take them."""

    digest: str
    """Digest of what answers."""
    linear: Placed
    """Factors of linear layers."""
    experts: Adapter
    """Factors of stacks of experts."""
    size_bytes: int
    """Of the factors."""
    kind: str = "low_rank"
    mixed_batch: bool = True


@dataclass
class Base:
    """A model that was loaded, and what stands in for its linear layers."""

    model: Any
    reader: DeltaReader
    swapped: Swapped | None = None
    """None: its own layers, which adapters wrap."""


class TorchRunner:
    """Computes a step's logits with one forward pass over all rows."""

    def __init__(self, base: Base, cache: paged.KVCache) -> None:
        self.model = base.model
        self.vocab_size: int = base.model.config.get_text_config().vocab_size
        self.cache = cache
        self.calls = 0
        """Attention calls of the last step."""
        self._base = base
        self._device = cache.device
        self._route = route_of(base.model)
        self._slots: dict[str, int] = {}
        self._own: dict[str, Any] = {}
        self._num_layers = base.model.config.get_text_config().num_hidden_layers

    @torch.inference_mode()
    def forward(self, rows: list[Row], keys: list[str | None], keep: list[int]) -> torch.Tensor:
        """See `Runner.forward`."""
        for row in rows:
            self.cache.place(row.seq)
        step = paged.Step(self.cache, rows)
        tokens = [token for row in rows for token in row.seq.tokens[row.start : row.start + row.length]]
        segments = segments_of(rows, keys)
        self._set_stretches(segments)
        alone = segments[0][0] if len(segments) == 1 else None
        # A delta with weights of its own stands alone in its steps.
        model = self.model if alone is None else self._own.get(alone, self.model)
        with paged.using(step), self._route.use(alone, None if len(segments) == 1 else segments):
            logits: torch.Tensor = model(
                input_ids=torch.tensor([tokens], device=self._device),
                position_ids=step.positions[None],
                use_cache=False,
                # An empty choice is a slice of nothing for some models, of everything for others.
                logits_to_keep=torch.tensor(keep or [0], device=self._device),
            ).logits[0]
        self.calls = step.calls
        if model is not self.model and self.calls != self._num_layers:
            logger.error("%s: %d of %d layers use the paged attention", alone, self.calls, self._num_layers)
            logits = logits.new_full(logits.shape, float("nan"))  # fails these rows, which are all its own
        return logits[: len(keep)]

    def _set_stretches(self, segments: list[Segment]) -> None:
        if self._base.swapped is not None:
            placed = [(self._slots[key], start, stop) for key, start, stop in segments if key in self._slots]
            self._base.swapped.route.stretches = Stretches.of(placed)

    def release(self, seq: Sequence) -> None:
        """Blocks are cleared when they are given out again."""

    def read_own(self, folder: str) -> OwnWeights:
        """See `Places.read_own`."""
        return self._base.reader.read_own(folder)

    def read(self, folder: str) -> LowRank | SlotDelta:
        """See `Places.read`."""
        found = self._base.reader.read(folder)
        if self._base.swapped is None:
            return found
        factors, stacks = found.adapter.factors, found.adapter.stacks
        pairs = {
            name: Pair(*pair, found.adapter.scaling(name))
            for name, pair in factors.items()
            if name not in stacks
        }
        for name in stacks:
            self._base.swapped.check_rank(name, factors[name][0].shape[-2])
        experts = dataclasses.replace(found.adapter, factors={name: factors[name] for name in stacks})
        return SlotDelta(found.digest, self._base.swapped.prepare(pairs), experts, found.size_bytes)

    def load(self, key: str, delta: LowRank | SlotDelta | OwnWeights) -> None:
        """See `Places.load`."""
        if isinstance(delta, OwnWeights):
            self._own[key] = delta.model.to(self._device)
            delta.model.set_attn_implementation(paged.NAME)
            return
        if isinstance(delta, LowRank):
            put_adapter(self.model, key, delta.adapter)
            return
        assert self._base.swapped is not None
        taken = set(self._slots.values())
        self._slots[key] = next(slot for slot in itertools.count() if slot not in taken)
        self._base.swapped.put(self._slots[key], delta.linear)
        if delta.experts.factors:
            put_adapter(self.model, key, delta.experts)

    def unload(self, key: str) -> None:
        """See `Places.unload`."""
        self._own.pop(key, None)
        if key in self._slots and self._base.swapped is not None:
            self._base.swapped.clear(self._slots.pop(key))
        unload_adapter(self.model, key)


@spec
class TorchEngineConfig(ModelEngineConfig):
    """Settings of our own engine."""

    max_num_seqs: int = Field(default=32, ge=1)
    """Requests that run at once."""
    max_batch_tokens: int = Field(default=2048, ge=1)
    """Tokens of one step, prompts and decoding together."""
    prompt_share: float = Field(default=0.3, gt=0)
    """Time that prompts may add to a step in which answers decode, as a part of such a step's own; more while many
    rows wait for their prompts and few decode."""
    block_size: int = Field(default=16, ge=1)
    """Tokens in one block of the cache."""
    max_lora_rank: int = Field(default=256, ge=1)
    """Greatest rank of a delta's factors: every slot of a layer is as wide as the widest delta it met."""
    prefix_cache: bool = True
    """Keep keys and values of ended requests while there is room, for prompts of the same tenant and delta that
    begin alike."""

    def build(self, base: str) -> StepEngine:
        """Load a base and return an engine over it, or over plain Hugging Face if the check fails.

        Raises:
            ModelError: if the base cannot be loaded.
            ConfigError: if the cache does not fit into memory.
        """
        self.use_threads()
        folder = resolve_folder(base)
        tokenizer = load_tokenizer(folder)
        gate = DeltaGate(folder, tokenizer)
        loaded, problem = self._load(folder, gate)
        if loaded is None:
            from ftray.engine.hf_generate import build_fallback

            logger.warning("%s: %s; using plain Hugging Face, one request at a time", folder, problem)
            return build_fallback(self, base)
        model = loaded.model
        scheduler = self.scheduler(max_positions(model.config))
        runner = self._runner(loaded, scheduler)
        self._allocate(runner)
        return StepEngine(
            runner,
            tokenizer,
            scheduler,
            engine_info("torch", gate, scheduler, self.max_loras),
            eos_ids(folder, model.config, tokenizer),
            kv_facts=kv_facts(model) if self.prefix_cache else None,
            max_host=self.max_cpu_loras,
            max_own=self.max_own_weights,
        )

    def _allocate(self, runner: TorchRunner) -> None:
        """Run one token, which allocates every layer's cache: now, and not under the first request."""
        seq = Sequence(Request(id="first", prompt_ids=[0]), 0, [0], row=0, blocks=[0])
        try:
            runner.forward([Row(seq, 0, 1)], [None], [0])
        except RuntimeError as error:  # also torch's out-of-memory errors
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"kv_cache_tokens: {self.kv_cache_tokens} cannot be held ({reason}); lower it"
            ) from None

    def scheduler(self, positions: int) -> Scheduler:
        """A scheduler for a model that takes `positions` tokens."""
        num_blocks = max(1, self.kv_cache_tokens // self.block_size)
        return Scheduler(
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=max(self.max_batch_tokens, self.max_num_seqs),
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_length=min(self.max_length or positions, positions, num_blocks * self.block_size),
            pace=Pace(self.prompt_share),
        )

    def _load(self, folder: Path, gate: DeltaGate | None) -> tuple[Base | None, str]:
        """The model with the fastest layers that pass the check; None, and the reason, if nothing does."""
        if problem := self._too_long(folder):
            return None, problem
        for swap in (True, False):
            try:
                model = load_model(folder, dtype=self.dtype, attn=paged.NAME).to(pick_device(self.device))
            except NotBuiltError as error:
                return None, str(error)
            except FtrayError:
                raise
            except (KeyError, ValueError, ImportError, NotImplementedError) as error:
                # Models with attention classes of their own look the name up and fail, each in its way.
                return None, f"it takes no registered attention ({type(error).__name__}: {error})"
            own = OwnReader(folder, model) if self.max_own_weights else None
            base = Base(model, DeltaReader(model, gate, own))
            problem = self.check(base, swap=swap) or ""
            if not problem:
                return base, ""
            if swap:
                logger.info("%s: %s; trying its own linear layers", folder, problem)
        return None, problem

    def _too_long(self, folder: Path) -> str:
        """Why rows of the length asked for cannot share a step; empty if they can."""
        config = load_config(folder)
        apart, declared = max_positions(config), declared_positions(config)
        if apart >= min(self.max_length or apart, declared):
            if apart < declared and not self.max_length:
                logger.warning(
                    "%s: takes %d of its %d tokens, for beyond them rows of a batch change each other's positions;"
                    " set max_length to have more, one request at a time",
                    *(folder, apart, declared),
                )
            return ""
        return f"beyond {apart} tokens rows of a batch change each other's positions, and max_length asks for more"

    def check(self, base: Base, *, swap: bool) -> str | None:
        """Why a model is not for this engine; None if it is. Its linear layers are swapped on the way if asked."""

        def make_runner(model: Any, scheduler: Scheduler) -> TorchRunner:
            if swap:
                base.swapped = Swapped(model, self.max_loras, self.max_lora_rank)
            return self._runner(base, scheduler)

        return self_check(base.model, make_runner, max_positions(base.model.config))

    def _runner(self, base: Base, scheduler: Scheduler) -> TorchRunner:
        device = next(base.model.parameters()).device
        num_blocks, length = scheduler.pool.num_blocks, scheduler.max_length
        cache = paged.KVCache(num_blocks, scheduler.block_size, scheduler.max_num_seqs, length, device)
        return TorchRunner(base, cache)
