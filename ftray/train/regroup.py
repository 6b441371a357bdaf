"""The same documents of a step in other rows: each alone, or joined as packing would."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from ftray.data.batch import Batch


def apart(batches: Iterable[Batch]) -> list[Batch]:
    """Every group of documents in a batch of its own, as without packing and with a batch size of one."""
    return [group for batch in batches for group in _groups(batch)]


def joined(batches: Iterable[Batch], max_length: int) -> list[Batch]:
    """Groups one after another in rows of at most `max_length` tokens, one row to a batch."""
    rows: list[list[Batch]] = [[]]
    for group in apart(batches):
        if rows[-1] and sum(part.num_tokens for part in rows[-1]) + group.num_tokens > max_length:
            rows.append([])
        rows[-1].append(group)
    return [_join(row) for row in rows if row]


def _groups(batch: Batch) -> Iterator[Batch]:
    bounds = batch.cu_seq_lens.tolist()
    documents = [0, *itertools.accumulate(batch.group_lens.tolist())]
    for first, last in itertools.pairwise(documents):
        start, stop = bounds[first], bounds[last]
        yield Batch(
            input_ids=batch.input_ids[:, start:stop],
            labels=batch.labels[:, start:stop],
            weights=batch.weights[:, start:stop],
            position_ids=batch.position_ids[:, start:stop],
            cu_seq_lens=batch.cu_seq_lens[first : last + 1] - start,
            group_lens=batch.group_lens[:0].new_tensor([last - first]),
            row_ids=batch.row_ids[:1],
        )


def _join(parts: Sequence[Batch]) -> Batch:
    starts = [0, *itertools.accumulate(part.num_tokens for part in parts)]
    moved = [part.cu_seq_lens[1:] + start for part, start in zip(parts, starts, strict=False)]
    return Batch(
        input_ids=torch.cat([part.input_ids for part in parts], 1),
        labels=torch.cat([part.labels for part in parts], 1),
        weights=torch.cat([part.weights for part in parts], 1),
        position_ids=torch.cat([part.position_ids for part in parts], 1),
        cu_seq_lens=torch.cat([parts[0].cu_seq_lens[:1], *moved]),
        group_lens=torch.cat([part.group_lens for part in parts]),
        row_ids=parts[0].row_ids[:1],
    )
