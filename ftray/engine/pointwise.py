"""Norms and gated units of a model's graph as one native pass each, where they are built and give the same."""

from typing import Any

import torch
from torch import nn

from ftray.engine import native
from ftray.engine.linear import Fused

_LANES = 16
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any leading axes."""
        return torch.ops.ftray_engine.rms_norm(x.contiguous(), self.weight, self.eps)


class GatedUnit(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, gate_up: Fused, down: nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up.linear
        self.down = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` to `[..., hidden]`."""
        return self.down(torch.ops.ftray_engine.silu_gate(self.gate_up(x)))


def swap_norms(model: nn.Module) -> int:
    """Replace the root-mean-square norms; returns how many."""
    found = [(name, norm) for name, m in model.named_modules() if (norm := _native_norm(m)) is not None]
    for name, norm in found:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, norm)
    return len(found)


def _native_norm(module: Any) -> RMSNorm | None:
    """A native norm that gives what the module gives: some multiply by the weight, some by one more."""
    if not type(module).__name__.endswith("RMSNorm") or getattr(module, "weight", None) is None:
        return None
    weight: torch.Tensor = module.weight.detach()
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not takes(weight) or eps is None:
        return None
    for candidate in (weight, (1.0 + weight.float()).to(weight.dtype)):
        norm = RMSNorm(candidate.clone(), float(eps))
        if same(module, norm, weight.shape[0], weight.dtype):
            return norm
    return None


def takes(weight: torch.Tensor) -> bool:
    """True if the native passes are there and made for vectors such as this."""
    fits = weight.device.type == "cpu" and weight.dtype in _TOLERANCE and not weight.shape[-1] % _LANES
    return fits and native.available()


@torch.inference_mode()
def same(old: nn.Module, new: nn.Module, size: int, dtype: torch.dtype) -> bool:
    """True if two modules map the same few rows to the same."""
    generator = torch.Generator().manual_seed(0)
    rows = (3 * torch.randn(1, 3, size, generator=generator)).to(dtype)
    try:
        expected, found = old(rows), new(rows)
    except Exception:  # a module that wants other arguments is another kind of module
        return False
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    scale = max(1e-6, float(expected.abs().max()))
    return float((expected.float() - found.float()).abs().max()) <= _TOLERANCE[dtype] * scale
