"""How fast a run goes: tokens a second, fraction of the machine's peak, memory, time left."""

import math
import resource
import sys
import time
from typing import Any

import torch
from torch import nn

from ftray.model.shard import whole_shape
from ftray.optim.first_order import FirstOrder, StepReport
from ftray.strategy.base import Strategy
from ftray.train.peak import matmul_peak


class Flops:
    """Floating-point operations of a step, counted from the model: 6 a parameter and token, and the attention.

    A frozen parameter costs 4 (no gradient of its own). Embeddings are looked up, not multiplied; the head
    counts where there is a target; of experts those that a token is sent to. What checkpointing computes again
    is not counted: it is no progress.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        head_ids = {id(p) for p in head.parameters()} if head is not None else set()
        tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
        used = (getattr(config, "num_experts_per_tok", None) or 1) / experts
        self.per_token = self.per_target = 0.0
        for parameter in model.parameters():
            shape = whole_shape(parameter)
            if len(shape) < 2:
                continue
            cost = (6.0 if parameter.requires_grad else 4.0) * math.prod(shape)
            if id(parameter) in head_ids:
                self.per_target += cost
            elif id(parameter) not in tables:
                self.per_token += cost * (used if len(shape) == 3 else 1.0)
        heads = getattr(config, "num_attention_heads", 0)
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
        # Two products forward and four backward of which a causal mask leaves half.
        self.per_squared_length = 6.0 * width * config.num_hidden_layers

    def of(self, report: StepReport) -> float:
        """Of one step, over all ranks."""
        tokens, targets = self.per_token * report.tokens, self.per_target * report.num_targets
        return tokens + targets + self.per_squared_length * report.squared_lengths


class Meter:
    """Reads the clock after every step.

    Args:
        engine: takes the steps.
        strategy: how many ranks share the work, and on what device.
    """

    def __init__(self, engine: FirstOrder, strategy: Strategy) -> None:
        self._flops, self._strategy, self._engine = Flops(engine.policy.model), strategy, engine
        self._peak: float | None = None
        self._last = time.perf_counter()
        self._begun: tuple[float, float] | None = None

    def read(self, report: StepReport, progress: float) -> dict[str, float]:
        """Metrics of the step that has just ended; measured on rank 0, of which the others tell nothing."""
        if self._strategy.dp_rank != 0:
            return {}
        now = time.perf_counter()
        seconds, self._last = max(now - self._last, 1e-9), now
        if self._peak is None:
            self._peak = matmul_peak(self._engine.bf16, self._strategy.device) * self._strategy.dp_size
            self._last = time.perf_counter()
        found = {
            "step_tokens_per_s": report.tokens / seconds,
            "fraction_of_peak": self._flops.of(report) / seconds / self._peak,
            "memory_gib": peak_memory_bytes(self._strategy.device) / 2**30,
        }
        # The first step of a process fills caches; what is left is judged by those after it.
        if self._begun is None:
            self._begun = now, progress
        elif progress > self._begun[1]:
            rate = (progress - self._begun[1]) / (now - self._begun[0])
            found["eta_s"] = (1.0 - progress) / rate
        return found


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory of this process so far: allocated on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
