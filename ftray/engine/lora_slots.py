"""Low-rank factors of many deltas in numbered slots of one layer, and their update of a step's tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ftray.engine import native

_LANES = 16
"""Columns are allocated in multiples of this, a vector of the native kernel."""
_TILE = 64
"""Outputs whose factors lie together, so that the native kernel reads them in order."""


@dataclass(frozen=True)
class Stretches:
    """A step's tokens by slot, in the order of the token axis; tokens of the base are left out."""

    rows: list[tuple[int, int, int]]
    """Slot, first token, token after the last."""
    table_N3: torch.Tensor
    """The same, for the native kernel."""

    @staticmethod
    def of(rows: list[tuple[int, int, int]]) -> "Stretches | None":
        """None if every token is the base's."""
        return Stretches(rows, torch.tensor(rows, dtype=torch.int64)) if rows else None


@dataclass(frozen=True)
class Pair:
    """One part's factors: the update is `scaling * B A`."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Prepared:
    """A delta's factors for one layer as a slot holds them, scaling and all."""

    a_IC: torch.Tensor
    """Columns of all parts side by side."""
    b_E: torch.Tensor
    """Part after part, `[tiles, rank, 64]` each; the last tile of a part is filled up with zeros."""
    ranks: list[int]
    """Of each part; 0: it has no update."""


class SlotFactors:
    """The slots of one layer, or of several that share their input.

    Args:
        in_features: of the shared input.
        widths: outputs of each part.
        num_slots: how many.
        dtype: of the base's weights, and so of the factors.
        device: where the layer is.
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.in_features, self.widths = in_features, list(widths)
        self.bounds = [0, *accumulate(widths)]
        self.used = False
        """True once anything was put."""
        self._ranks = [[0] * len(widths) for _ in range(num_slots)]
        self._ranks_table = torch.zeros(num_slots, len(widths), dtype=torch.int64)
        self._bounds_table = torch.tensor(self.bounds, dtype=torch.int64)
        self._a_SIC = torch.empty(num_slots, in_features, 0, dtype=dtype, device=device)
        self._b_SE = torch.empty(num_slots, 0, dtype=dtype, device=device)
        self._native = (
            device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and native.available()
        )

    def prepare(self, parts: Mapping[int, Pair]) -> Prepared:
        """Factors by part as `put` takes them; touches no slot, so it may run beside a step."""
        ranks = [parts[part].a_RI.shape[0] if part in parts else 0 for part in range(len(self.widths))]
        dtype = self._a_SIC.dtype
        a_IC = torch.cat([parts[part].a_RI.T.to(dtype) for part in sorted(parts)], 1)
        pieces = [_tiled(parts[part].b_OR * parts[part].scaling).to(dtype) for part in sorted(parts)]
        return Prepared(a_IC, torch.cat(pieces), ranks)

    def put(self, slot: int, prepared: Prepared) -> None:
        """Fill a slot; what it held is gone."""
        columns = prepared.a_IC.shape[1]
        self._reserve(slot + 1, columns, len(prepared.b_E))
        self._a_SIC[slot, :, :columns] = prepared.a_IC
        self._b_SE[slot, : len(prepared.b_E)] = prepared.b_E
        self._set_ranks(slot, prepared.ranks)
        self.used = True

    def clear(self, slot: int) -> None:
        """Let a slot add nothing."""
        if slot < len(self._ranks):
            self._set_ranks(slot, [0] * len(self.widths))

    def add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, stretches: Stretches) -> None:
        """Add the slots' updates to `y` in place."""
        if self._native and x_TI.dtype == y_TO.dtype == self._a_SIC.dtype:
            torch.ops.ftray_engine.lora_add(
                y_TO,
                x_TI,
                self._a_SIC,
                self._b_SE,
                self._ranks_table,
                self._bounds_table,
                stretches.table_N3,
            )
        else:
            self._add_plain(y_TO, x_TI, stretches)

    def _add_plain(self, y_TO: torch.Tensor, x_TI: torch.Tensor, stretches: Stretches) -> None:
        for slot, start, stop in stretches.rows:
            ranks = self._ranks[slot] if slot < len(self._ranks) else []
            columns = sum(ranks)
            if not columns:
                continue
            inner = x_TI[start:stop].to(self._a_SIC.dtype) @ self._a_SIC[slot, :, :columns]
            column = place = 0
            for part, rank in enumerate(ranks):
                tiles = -(-self.widths[part] // _TILE)
                if rank:
                    b_NRW = self._b_SE[slot, place : place + tiles * rank * _TILE].view(tiles, rank, _TILE)
                    update = (inner[:, column : column + rank] @ b_NRW).transpose(0, 1).flatten(1)
                    y_TO[start:stop, self.bounds[part] : self.bounds[part + 1]] += update[
                        :, : self.widths[part]
                    ]
                column += rank
                place += tiles * rank * _TILE

    def _reserve(self, slots: int, columns: int, size: int) -> None:
        """Room for so many slots, columns of A and elements of B; not touched until it is filled."""
        a, b = self._a_SIC, self._b_SE
        if slots <= len(a) and columns <= a.shape[2] and size <= b.shape[1]:
            return
        if slots > len(a):
            slots = 2 * slots
        columns = -(-max(columns, a.shape[2]) // _LANES) * _LANES
        # Either may find no memory, and what others have in the slots must then be as it was.
        wide_a = a.new_zeros(max(slots, len(a)), self.in_features, columns)
        wide_b = b.new_zeros(max(slots, len(b)), max(size, b.shape[1]))
        for slot, ranks in enumerate(self._ranks):
            if any(ranks):
                wide_a[slot, :, : a.shape[2]] = a[slot]
                wide_b[slot, : b.shape[1]] = b[slot]
        ranks_of = self._ranks + [[0] * len(self.widths) for _ in range(len(wide_a) - len(a))]
        table = torch.tensor(ranks_of, dtype=torch.int64)
        self._a_SIC, self._b_SE, self._ranks, self._ranks_table = wide_a, wide_b, ranks_of, table

    def _set_ranks(self, slot: int, ranks: list[int]) -> None:
        self._ranks[slot] = ranks
        self._ranks_table[slot] = torch.tensor(ranks, dtype=torch.int64)


def _tiled(b_OR: torch.Tensor) -> torch.Tensor:
    """`[tiles, rank, 64]`, flat."""
    outputs, rank = b_OR.shape
    padded = torch.nn.functional.pad(b_OR, (0, 0, 0, -outputs % _TILE))
    return padded.view(-1, _TILE, rank).transpose(1, 2).reshape(-1)
