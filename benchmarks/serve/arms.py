"""The sides of a comparison: our engine, and `generate` of transformers with PEFT's mixed batches."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.serve.setup import Prompt
from ftray.engine.api import Request, Sampling
from ftray.engine.core import StepEngine
from ftray.engine.torch_engine import TorchEngineConfig

Work = Callable[[], int]
"""Does a piece of work and returns its tokens, of prompts and answers together."""


@dataclass(frozen=True)
class Rate:
    """Tokens of prompts and answers by the processor's clock and by the wall's."""

    per_cpu_s: float
    per_s: float


def measure(work: Work, clock: Callable[[], float] = time.process_time) -> Rate:
    """Run once; `clock` tells the processor seconds of what computes it."""
    wall, cpu = time.perf_counter(), clock()
    tokens = work()
    wall, cpu = time.perf_counter() - wall, clock() - cpu
    return Rate(tokens / cpu, tokens / wall)


def interleave(
    arms: Mapping[str, Work], rounds: int, clocks: Mapping[str, Callable[[], float]] = MappingProxyType({})
) -> dict[str, list[Rate]]:
    """Every arm once a round, after a round that is not counted; by its clock if it is not computed here."""
    found: dict[str, list[Rate]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, work in arms.items():
            rate = measure(work, clocks.get(name, time.process_time))
            if number:
                found[name].append(rate)
    return found


def our_engine(base: Path, adapters: Mapping[str, Path], dtype: str, **settings: Any) -> StepEngine:
    """The product's engine with its adapters loaded."""
    known: dict[str, Any] = {
        "prefix_cache": False,
        "dtype": dtype,
        "device": "cpu",
        "kv_cache_tokens": 16384,
        "num_threads": torch.get_num_threads(),
    }
    engine = TorchEngineConfig(**(known | settings)).build(str(base))
    assert engine.info.engine == "torch", engine.info
    for name, folder in adapters.items():
        engine.load_delta(name, str(folder))
    return engine


_NUMBERS = itertools.count()


def our_requests(prompts: Sequence[Prompt], new_tokens: int) -> list[Request]:
    """Greedy requests of exactly so many new tokens."""
    sampling = Sampling(max_tokens=new_tokens, ignore_eos=True)
    return [
        Request(id=str(next(_NUMBERS)), prompt_ids=prompt.ids, delta=prompt.adapter, sampling=sampling)
        for prompt in prompts
    ]


def ours(engine: StepEngine, prompts: Sequence[Prompt], new_tokens: int) -> Work:
    """All requests at once; text and all."""

    def work() -> int:
        outputs = engine.generate(our_requests(prompts, new_tokens))
        assert all(len(output.token_ids) == new_tokens for output in outputs)
        return sum(len(prompt.ids) + new_tokens for prompt in prompts)

    return work


class HuggingFace:
    """A model of transformers, with PEFT around it if there are adapters."""

    def __init__(self, base: Path, adapters: Mapping[str, Path], dtype: str, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        self._device = device
        if adapters:
            from peft import PeftModel

            (first, folder), *rest = adapters.items()
            self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=first)
            for name, folder in rest:
                self.model.load_adapter(str(folder), adapter_name=name)
        self.model.eval().to(device)

    def work(self, prompts: Sequence[Prompt], new_tokens: int, batch: int) -> Work:
        """Batches of requests sorted by length, so that little is padded; token ids only."""
        ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
        batches = [ordered[at : at + batch] for at in range(0, len(ordered), batch)]

        def work() -> int:
            for group in batches:
                self._generate(group, new_tokens)
            return sum(len(prompt.ids) + new_tokens for prompt in prompts)

        return work

    def fastest(self, prompts: Sequence[Prompt], new_tokens: int, batches: Sequence[int]) -> tuple[int, Work]:
        """The batch size with most tokens a second of processor time."""
        found = {size: self.work(prompts, new_tokens, size) for size in batches}
        if len(found) == 1:
            return next(iter(found.items()))
        size = max(found, key=lambda size: measure(found[size]).per_cpu_s)
        return size, found[size]

    @torch.inference_mode()
    def worst_gap(self, prompt: list[int], answer: list[int], adapter: str | None) -> float:
        """How far an answer's tokens are below the greatest logit at most, each after those before it."""
        ids = torch.tensor([prompt + answer[:-1]], device=self._device)
        more = {} if adapter is None else {"adapter_names": [adapter]}
        logits_TV = self.model(input_ids=ids, **more).logits[0, len(prompt) - 1 :].float()
        chosen_T = logits_TV.gather(1, torch.tensor(answer, device=self._device)[:, None])[:, 0]
        return float((logits_TV.max(-1).values - chosen_T).max())

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Prompt], new_tokens: int) -> None:
        width = max(len(prompt.ids) for prompt in prompts)
        # Padded at the left, as decoding goes on at the right.
        ids = torch.tensor([[1] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
        names = [prompt.adapter or "__base__" for prompt in prompts]
        more = {"adapter_names": names} if any(prompt.adapter for prompt in prompts) else {}
        output = self.model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **more,
        )
        assert output.cpu().shape == (len(prompts), width + new_tokens)  # waits for the device
