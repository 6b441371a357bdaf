"""Preference pairs in a batch: which documents are the chosen and the rejected answer to one prompt."""

from collections.abc import Mapping

import torch

from ftray.data.batch import Batch


def chosen_documents(batch: Batch) -> torch.Tensor:
    """Index of the chosen document of each pair, `[P]` int64; the rejected one follows it.

    The row that fills up a batch holds a group of one document, which is no pair.
    """
    lengths = batch.group_lens.long()
    starts = lengths.cumsum(0) - lengths
    return starts[lengths == 2]


def num_pairs(batch: Batch) -> int:
    """Pairs in the batch."""
    return int((batch.group_lens == 2).sum())


def reward_metrics(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Sums over pairs of what is logged about rewards, by TRL's names; no gradients."""
    chosen_P, rejected_P = chosen_P.detach(), rejected_P.detach()
    return {
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/margins": (chosen_P - rejected_P).sum(),
        "rewards/accuracies": (chosen_P > rejected_P).float().sum(),
    }


REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""Names `reward_metrics` gives."""
