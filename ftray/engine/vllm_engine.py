"""vLLM behind the engine's protocol, where a Python has it: the choice for GPUs and plain LoRA.

vLLM decides what runs: its own order (priority, then arrival; no weights of tenants), preemption and prefix cache,
whose entries are kept apart by tenant, delta and salt. Deltas are plain LoRA of at most `max_lora_rank`.
"""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ftray.core.errors import ConfigError, DeltaError, RequestError
from ftray.core.spec import spec
from ftray.engine.api import DeltaInfo, EngineInfo, EngineStats, Output, Request, Sampling, ScoreItem, Source
from ftray.engine.gate import DeltaGate, folder_digest
from ftray.engine.vllm_words import VLLMDelta, prompt_logprobs, sampling_params, token_logprob
from ftray.engine.whole import generate
from ftray.model.folder import resolve_folder
from ftray.model.tokenizer import load_tokenizer


class VLLMEngine:
    """An `Engine` over vLLM's own, in this process.

    Args:
        engine: vLLM's `LLMEngine`.
        tokenizer: the base's tokenizer.
        gate: refuses what does not belong to the base.
        info: facts to report.
    """

    def __init__(self, engine: Any, tokenizer: Any, gate: DeltaGate, info: EngineInfo) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._engine = engine
        self._on_cpu = engine.vllm_config.device_config.device_type == "cpu"
        self._gate = gate
        self._deltas: dict[str, VLLMDelta] = {}
        self._ids = itertools.count(1)
        self._live: dict[str, tuple[Request, VLLMDelta | None, set[int]]] = {}

    def add(self, request: Request) -> None:
        """See `Engine.add`; a delta that is registered only is read here."""
        sampling = request.sampling
        delta = None
        if request.delta is not None and (delta := self._deltas.get(request.delta)) is None:
            message = f"delta: {request.delta!r} is not loaded"
            raise RequestError(message, status=404, code="model_not_found", param="model")
        if request.id in self._live:
            raise RequestError(f"id: {request.id!r} is already in the engine; use a new one", param="id")
        if not request.prompt_ids:
            raise RequestError("prompt: it has no token; write something", param="prompt")
        vocab_size = self._engine.model_config.get_vocab_size()
        request.check_ids(vocab_size)
        if sampling.prompt_logprobs is not None and self._on_cpu:
            # Its LoRA operations on CPUs fail on a prompt's logits, and with them every request in the step.
            message = "prompt_logprobs: vLLM has none on CPUs beside deltas; use `engine: torch`"
            raise RequestError(message, param="prompt_logprobs")
        if len(request.prompt_ids) + sampling.max_tokens > self.info.max_length:
            raise RequestError(
                f"prompt: {len(request.prompt_ids)} tokens and max_tokens {sampling.max_tokens} exceed the"
                f" {self.info.max_length} tokens taken here; shorten one of them",
                code="context_length_exceeded",
                param="max_tokens",
            )
        if delta is not None and delta.lora is None:
            self._read(delta)
        # A length before each part: tenant `ab` with salt `c` is not tenant `a` with salt `bc`.
        salt = f"{len(request.tenant)}:{request.tenant}:{request.cache_salt}"
        prompt = {"prompt_token_ids": list(request.prompt_ids), "cache_salt": salt}
        self._engine.add_request(
            request.id,
            prompt,
            sampling_params(sampling, vocab_size),
            lora_request=delta.lora if delta else None,
            priority=request.priority,
        )
        self._live[request.id] = request, delta, set(range(sampling.n))
        if delta:
            delta.in_flight += 1

    def step(self) -> list[Output]:
        """See `Engine.step`."""
        if not self._engine.has_unfinished_requests():
            return []
        return [
            output
            for found in self._engine.step()
            if found.request_id in self._live
            for output in self._outputs(found)
        ]

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        if request_id in self._live:
            self._engine.abort_request([request_id])
            self._forget(request_id)

    def has_work(self) -> bool:
        """See `Engine.has_work`."""
        return bool(self._live)

    def load_delta(self, name: str, folder: str, *, replace: bool = False) -> None:
        """See `Engine.load_delta`; vLLM reads the tensors with the first request."""
        if name in self._deltas and not replace:
            raise DeltaError(f"{name}: already loaded; unload it first or use another name")
        delta = VLLMDelta(folder)
        self._read(delta)
        old, self._deltas[name] = self._deltas.get(name), delta
        if old is not None:
            self._let_go(old)

    def register_delta(self, name: str, source: Source) -> None:
        """See `Engine.register_delta`."""
        if name in self._deltas:
            raise DeltaError(f"{name}: already loaded; unload it first or use another name")
        self._deltas[name] = VLLMDelta(source)

    def unload_delta(self, name: str) -> None:
        """See `Engine.unload_delta`."""
        if self._find(name).in_flight:
            raise DeltaError(f"{name}: requests under it are in flight; wait for them or cancel them")
        self._let_go(self._deltas.pop(name))

    def deltas(self) -> list[str]:
        """See `Engine.deltas`."""
        return list(self._deltas)

    def delta_info(self, name: str) -> DeltaInfo:
        """See `Engine.delta_info`; where vLLM has the tensors it does not say."""
        delta = self._find(name)
        tier: Literal["host", "disk"] = "host" if delta.lora else "disk"
        facts: dict[str, Any] = {
            "kind": "low_rank" if delta.lora else "",
            "mixed_batch": True,
            "size_bytes": 0,
        }
        return DeltaInfo(name=name, digest=delta.digest, tier=tier, in_flight=delta.in_flight, **facts)

    def stats(self) -> EngineStats:
        """See `Engine.stats`; vLLM's own metrics have its blocks."""
        return EngineStats(running=len(self._live), waiting=0, blocks_used=0, blocks_total=0)

    def generate(self, requests: Iterable[Request]) -> list[Output]:
        """See `Engine.generate`."""
        return generate(self, requests)

    def score(self, items: Iterable[ScoreItem]) -> list[float]:
        """See `Engine.score`."""
        requests = []
        for number, item in enumerate(items):
            start = len(item.prompt_ids)
            sampling = Sampling(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=start)
            ids = [*item.prompt_ids, *item.completion_ids]
            requests.append(Request(id=str(number), prompt_ids=ids, delta=item.delta, sampling=sampling))
        found = [output.prompt_logprobs or [] for output in self.generate(requests)]
        return [sum(token.logprob for token in tokens if token) for tokens in found]

    def _outputs(self, found: Any) -> Iterable[Output]:
        request, delta, open_answers = self._live[found.request_id]
        sampling = request.sampling
        prompt = None
        if sampling.prompt_logprobs is not None and found.prompt_logprobs:
            prompt = prompt_logprobs(request, found.prompt_logprobs, sampling.prompt_logprobs)
        for part in found.outputs:
            ids = list(part.token_ids) if sampling.max_tokens else []
            logprobs = None
            if sampling.logprobs is not None:
                pairs = zip(ids, part.logprobs or [], strict=False)
                logprobs = [token_logprob(token, entry, sampling.logprobs) for token, entry in pairs]
            reason = part.finish_reason
            yield Output(
                id=request.id,
                index=part.index,
                text=part.text if sampling.max_tokens else "",
                token_ids=ids,
                finish_reason="cancelled" if reason == "abort" else reason,
                stop_reason=part.stop_reason,
                digest=delta.digest if delta else self.info.base_digest,
                logprobs=logprobs,
                prompt_logprobs=prompt,
                num_cached_tokens=found.num_cached_tokens or 0,
            )
            if reason is not None:
                open_answers.discard(part.index)
        if not open_answers:
            self._forget(found.request_id)

    def _forget(self, request_id: str) -> None:
        _, delta, _ = self._live.pop(request_id)
        if delta:
            delta.in_flight -= 1
            self._let_go(delta)

    def _let_go(self, delta: VLLMDelta) -> None:
        """Remove what no name stands for, once no request runs under it."""
        if delta.lora is not None and not delta.in_flight and delta not in self._deltas.values():
            self._engine.remove_lora(delta.lora.lora_int_id)
            delta.lora = None

    def _read(self, delta: VLLMDelta) -> None:
        from vllm.lora.request import LoRARequest

        folder = Path(delta.source if isinstance(delta.source, str) else delta.source())
        found = self._gate.check(folder)
        if found is not None and found.kind != "low_rank":
            raise DeltaError(f"{folder}: vLLM has no {found.kind} deltas; use `engine: torch`")
        delta.digest = found.digest if found else folder_digest(folder)
        number = next(self._ids)
        delta.lora = LoRARequest(f"delta{number}", number, str(folder))
        try:
            self._engine.add_lora(delta.lora)
        # vLLM's refusals (rank, targets, damaged files) have no class of their own.
        except Exception as error:
            delta.lora = None
            raise DeltaError(f"{folder}: vLLM refuses it ({' '.join(str(error).split())[:160]})") from None

    def _find(self, name: str) -> VLLMDelta:
        if name not in self._deltas:
            raise DeltaError(f"{name}: not loaded; loaded are: {', '.join(self._deltas) or 'none'}")
        return self._deltas[name]


@spec
class VLLMEngineConfig:
    """Settings of vLLM as the engine; needs a Python with vLLM in it."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the base's weights and of the key-value cache."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Answers that run at once."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of a prompt and its answer; null: what the model takes."""
    max_loras: int = Field(default=8, ge=1)
    """Deltas in place at once."""
    max_cpu_loras: int = Field(default=64, ge=1)
    """Deltas kept in memory."""
    max_lora_rank: int = Field(default=64, ge=1)
    """Greatest rank; every delta costs as much as one of this rank."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further fields of vLLM's `EngineArgs`."""

    def load_tokenizer(self, base: str) -> Any:
        """The base's tokenizer."""
        return load_tokenizer(resolve_folder(base))

    def build(self, base: str) -> VLLMEngine:
        """Load a base and return an engine over it. Raises `ConfigError` if this Python has no vLLM."""
        # The engine's protocol is one thread that steps: no process beside it.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import EngineArgs, LLMEngine
        except ImportError as error:
            raise ConfigError(f"engine: vllm: this Python has no vLLM ({error}); use `torch`") from None
        folder = resolve_folder(base)
        tokenizer = self.load_tokenizer(base)
        gate = DeltaGate(folder, tokenizer)
        arguments = {
            "model": str(folder),
            "dtype": self.dtype,
            "max_model_len": self.max_length,
            "max_num_seqs": self.max_num_seqs,
            "enable_lora": True,
            "max_loras": self.max_loras,
            "max_cpu_loras": max(self.max_loras, self.max_cpu_loras),
            "max_lora_rank": self.max_lora_rank,
            "scheduling_policy": "priority",
        }
        try:
            engine = LLMEngine.from_engine_args(EngineArgs(**(arguments | self.engine_args)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"engine: vllm: {' '.join(str(error).split())[:300]}") from None
        info = EngineInfo(
            engine="vllm",
            base=gate.identity["name"],
            base_digest=gate.identity["digest"],
            chat_template_hash=gate.template_hash,
            max_length=int(engine.model_config.max_model_len),
            max_slots=self.max_loras,
        )
        return VLLMEngine(engine, tokenizer, gate, info)
