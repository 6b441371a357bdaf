"""Batches for training: packed rows laid end to end, without padding.

Documents are kept apart by `cu_seq_lens` and by positions that restart at each of them, not by a mask.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ftray.data.read import IGNORE_INDEX, RowArrays


@dataclass(frozen=True)
class Batch:
    """N tokens of D documents from R rows."""

    input_ids: torch.Tensor
    """Token ids, [1, N] int64."""
    labels: torch.Tensor
    """The token's own id where it is a target, else -100; not shifted, [1, N] int64."""
    weights: torch.Tensor
    """Weight of each target in the loss, 0 where there is none, [1, N] float32."""
    position_ids: torch.Tensor
    """Positions that start at 0 in every document, [1, N] int64."""
    cu_seq_lens: torch.Tensor
    """Where documents begin, and N at the end, [D + 1] int32."""
    group_lens: torch.Tensor
    """Documents of each group (2: a preference pair, chosen first), [G] int32; they sum to D."""
    row_ids: torch.Tensor
    """Indices of the rows in the data set, -1 for padding rows, [R] int64."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return self.input_ids.shape[1]

    @property
    def num_targets(self) -> int:
        """Tokens whose prediction enters the loss."""
        return int((self.labels != IGNORE_INDEX).sum())


def collate(rows: Sequence[RowArrays], row_ids: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
    """Lay rows end to end as one batch; `row_ids` are their indices in the data set.

    At least one row is needed; `padding_row()` stands for a rank that has none.
    """
    assert len(rows) == len(row_ids) and rows
    input_ids, labels, weights, doc_lens, group_lens = map(np.concatenate, zip(*rows, strict=True))
    bounds = np.zeros(len(doc_lens) + 1, np.int32)
    np.cumsum(doc_lens, out=bounds[1:])
    positions = np.repeat(bounds[:-1].astype(np.int64), doc_lens)
    np.subtract(_numbers(len(positions)), positions, out=positions)
    # Joined first and widened then: a pass over what the cache still holds costs less than a cast of each row.
    return Batch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)[None]),
        labels=torch.from_numpy(labels.astype(np.int64)[None]),
        weights=torch.from_numpy(weights[None]),
        position_ids=torch.from_numpy(positions[None]),
        cu_seq_lens=torch.from_numpy(bounds),
        group_lens=torch.from_numpy(group_lens),
        row_ids=torch.as_tensor(np.asarray(row_ids, np.int64)),
    )


def join(batches: Sequence[Batch]) -> Batch:
    """Batches end to end as one; a single one is itself."""
    if len(batches) == 1:
        return batches[0]
    bounds, end = [batches[0].cu_seq_lens[:1]], 0
    for batch in batches:
        bounds.append(batch.cu_seq_lens[1:] + end)
        end += batch.num_tokens
    tokens = {
        name: torch.cat([getattr(batch, name) for batch in batches], 1)
        for name in ("input_ids", "labels", "weights", "position_ids")
    }
    rest = {
        name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("group_lens", "row_ids")
    }
    return Batch(**tokens, **rest, cu_seq_lens=torch.cat(bounds))


def _numbers(count: int) -> npt.NDArray[np.int64]:
    """0, 1, 2 ..., made once: the counting took as long as what is done with the numbers."""
    return _counted((count - 1).bit_length())[:count]


@functools.cache
def _counted(bits: int) -> npt.NDArray[np.int64]:
    return np.arange(1 << bits)
