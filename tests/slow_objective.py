"""A user's own objectives: one that takes its time, so that a run can be killed in its middle, one that breaks."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.objective.lm import SupervisedFineTuning


@spec
class Slow(SupervisedFineTuning):
    """Supervised fine-tuning that takes its time and says which process is rank 0."""

    pause_s: float = 0.05
    pid_file: str = ""

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        time.sleep(self.pause_s)
        if self.pid_file and dist.get_rank() == 0:
            Path(self.pid_file).write_text(str(os.getpid()))
        return super().sums(policy, batch)


@spec
class Infinite(SupervisedFineTuning):
    """An infinite loss whose gradient is finite."""

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        return {"nll": super().sums(policy, batch)["nll"] + float("inf")}
