"""Random batches: documents end to end, as the data plane lays them, and the same padded, as TRL takes them."""

import torch

from ftray.data.batch import Batch


def pair_batch(prompts: tuple[int, ...] = (5, 9, 3), *, padding: bool = True) -> Batch:
    """Pairs with prompts of these lengths and random answers; last, a padding document that is no pair."""
    generator = torch.Generator().manual_seed(0)
    ids, targets, groups = [], [], []
    for length in prompts:
        prompt = torch.randint(2, 250, (length,), generator=generator)
        for answer in torch.randint(2, 12, (2,), generator=generator).tolist():
            ids.append(torch.cat([prompt, torch.randint(2, 250, (answer,), generator=generator)]))
            targets.append(torch.arange(length + answer) >= length)
        groups.append(2)
    if padding:
        ids.append(torch.zeros(1, dtype=torch.long))
        targets.append(torch.zeros(1, dtype=torch.bool))
        groups.append(1)
    return join(ids, targets, groups)


def join(ids: list[torch.Tensor], targets: list[torch.Tensor], groups: list[int]) -> Batch:
    """Documents end to end; the marked tokens are targets."""
    lengths = [len(document) for document in ids]
    flat, is_target = torch.cat(ids), torch.cat(targets)
    return Batch(
        input_ids=flat[None],
        labels=torch.where(is_target, flat, -100)[None],
        weights=is_target.float()[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens=torch.tensor([0, *lengths]).cumsum(0).int(),
        group_lens=torch.tensor(groups, dtype=torch.int32),
        row_ids=torch.tensor([0]),
    )


def padded_pairs(batch: Batch) -> dict[str, torch.Tensor]:
    """The pairs of a batch as TRL's collator gives them: chosen answers first, padded on the right."""
    bounds = batch.cu_seq_lens.tolist()
    documents = [slice(bounds[i], bounds[i + 1]) for i in range(2 * int((batch.group_lens == 2).sum()))]
    ordered = documents[0::2] + documents[1::2]
    longest = max(document.stop - document.start for document in ordered)

    def pad(values: torch.Tensor, fill: int) -> torch.Tensor:
        rows = [values[document] for document in ordered]
        return torch.stack(
            [torch.nn.functional.pad(row, (0, longest - len(row)), value=fill) for row in rows]
        )

    return {
        "input_ids": pad(batch.input_ids[0], 1),
        "attention_mask": pad(torch.ones_like(batch.input_ids[0]), 0),
        "completion_mask": pad((batch.labels[0] != -100).long(), 0),
    }
