"""One rank of several without the others, and an objective that keeps the ids of the rows it was asked about."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.objective.lm import SupervisedFineTuning
from ftray.strategy.single import Single


@spec
class OneRank(Single):
    """Rank `rank` of `size`: it takes its own rows and meets nobody."""

    rank: int = 0
    size: int = 1

    @property
    def dp_rank(self) -> int:
        return self.rank

    @property
    def dp_size(self) -> int:
        return self.size


@spec
class Recording(SupervisedFineTuning):
    """Supervised fine-tuning that appends the row ids of every micro batch it trains on to a file of its rank.

    Ranks of a process group write to one file each. A file `<path>.breaks` says after how many micro batches it
    is interrupted.
    """

    path: str = ""

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        found = super().sums(policy, batch)
        if torch.is_grad_enabled():
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            path = Path(f"{self.path}.{rank}")
            with path.open("a") as file:
                file.write(" ".join(map(str, batch.row_ids.tolist())) + "\n")
            breaks = Path(f"{self.path}.breaks")
            if breaks.exists() and len(path.read_text().splitlines()) >= int(breaks.read_text()):
                raise KeyboardInterrupt
        return found


def recorded(path: Path, micro_batches: int) -> list[list[int]]:
    """Row ids of each whole step that a rank recorded."""
    lines = [[int(word) for word in line.split()] for line in path.read_text().splitlines()]
    whole = len(lines) // micro_batches * micro_batches
    steps = [lines[i : i + micro_batches] for i in range(0, whole, micro_batches)]
    return [[row for line in step for row in line] for step in steps]
