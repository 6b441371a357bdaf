"""Linear layers as the engine runs them: weights in the layout the processor likes, low-rank updates by slot."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ftray.engine.lora_slots import SlotFactors, Stretches

logger = logging.getLogger(__name__)

# Rows the weights are laid out for. With 1 every other number of rows is slow; from 8 on they are all alike.
_PACKED_FOR_ROWS = 8
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Multiply(Protocol):
    """`x` `[..., in]` to `x W' + b` `[..., out]`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        ...


class PlainMultiply:
    """torch's own product."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._weight, self._bias = weight_OI, bias_O

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Multiply`."""
        return F.linear(x, self._weight, self._bias)


class PackedMultiply:
    """oneDNN's product over weights that it laid out itself: twice as fast and more in float32.

    Through operations that torch keeps for its compiler; who makes one compares it with the plain product.

    Raises:
        RuntimeError: where oneDNN does not take this type or processor.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _PACKED_FOR_ROWS)
        self._bias = bias_O
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Multiply`."""
        return self._multiply(x, self._packed, self._bias, "none", [], "")


def fastest(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Multiply:
    """The packed product where it can be had and gives what the plain one gives, else that."""
    plain = PlainMultiply(weight_OI, bias_O)
    if weight_OI.device.type != "cpu" or weight_OI.dtype not in _TOLERANCE:
        return plain
    try:
        packed = PackedMultiply(weight_OI, bias_O)
        rows = torch.linspace(-1, 1, 3 * weight_OI.shape[1]).view(3, -1).to(weight_OI.dtype)
        expected, found = plain(rows).float(), packed(rows).float()
    # The operations are not part of torch's interface: they may be gone, or refuse, in any way.
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        logger.info("no packed linear layers here: %s", " ".join(str(error).split())[:120])
        return plain
    scale = max(1e-6, float(expected.abs().max()))
    if not float((expected - found).abs().max()) <= _TOLERANCE[weight_OI.dtype] * scale:
        logger.warning("packed linear layers give something else here; using plain ones")
        return plain
    return packed


@dataclass
class StepRoute:
    """What all layers of a model read while a step runs."""

    stretches: Stretches | None = None
    """None: every token goes through the bare base."""


class SlotLinear(nn.Module):
    """One or more linear layers over the same input, as one product: `y = W x + b`, and `+ B_s A_s x` by slot.

    Args:
        weights: `[out, in]` of each part. They are not kept where the product has a layout of its own.
        biases: of each part, all or none.
        route: tells which token goes through which slot.
        num_slots: slots for low-rank updates.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        route: StepRoute,
        num_slots: int,
    ) -> None:
        super().__init__()
        weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        bias = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.bounds = [0, *accumulate(weight.shape[0] for weight in weights)]
        self.multiply = fastest(weight, bias)
        self.route = route
        widths = [weight.shape[0] for weight in weights]
        self.slots = SlotFactors(weight.shape[1], widths, num_slots, weight.dtype, weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`, the parts side by side."""
        y = self.multiply(x)
        if self.route.stretches is not None and self.slots.used:
            self.slots.add(
                y.view(-1, self.out_features), x.reshape(-1, self.in_features), self.route.stretches
            )
        return y


class FusedPart(nn.Module):
    """One of several layers that are called one after another with the same tensor, such as q, k and v.

    The first call computes all of them. A model that changed the tensor in between would be wrong; the check at
    load finds that out.
    """

    def __init__(self, shared: "Fused", part: int) -> None:
        super().__init__()
        self.shared = shared
        start, stop = shared.linear.bounds[part : part + 2]
        self._span = slice(start, stop)
        self.in_features, self.out_features = shared.linear.in_features, stop - start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`."""
        return self.shared(x)[..., self._span]


class Fused:
    """The product that parts share, kept until each has had its share."""

    def __init__(self, linear: SlotLinear) -> None:
        self.linear = linear
        self._left = 0
        self._x: torch.Tensor | None = None
        self._y: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """All parts' outputs for the tensor `x`."""
        if x is not self._x or self._y is None:
            self._x, self._y, self._left = x, self.linear(x), len(self.linear.bounds) - 1
        y = self._y
        self._left -= 1
        if not self._left:
            self._x = self._y = None
        return y
