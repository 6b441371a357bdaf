"""What strategies of several workers share: the process group, and how tensors are summed over it."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field

from ftray.core.spec import spec
from ftray.strategy.elastic import NumWorkers

_BUCKET_ELEMENTS = 1 << 24


@spec
class Workers:
    """Workers of Ray Train in one process group; every one of them sees other rows."""

    num_workers: NumWorkers = 2
    """Workers; `[least, most]`: as many as the cluster has room for, also while the run goes on."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs of each worker."""
    max_failures: int = Field(default=2, ge=0)
    """Times the worker group is restarted from its newest checkpoint."""
    wait_for_room_s: float = Field(default=600.0, gt=0)
    """Seconds to wait for room in the cluster for the (least) workers before the run is given up."""

    @property
    def in_process(self) -> bool:
        """Workers of Ray Train, even if it is one."""
        return False

    @property
    def dp_rank(self) -> int:
        """Rank in the process group."""
        return dist.get_rank()

    @property
    def dp_size(self) -> int:
        """Size of the process group."""
        return dist.get_world_size()

    @property
    def device(self) -> torch.device:
        """This worker's GPU if there is one, else the CPU."""
        return local_device()

    @property
    def weights_device(self) -> torch.device:
        """Where it computes."""
        return self.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce; the sum lies where the values did."""
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def share(self, value: Any) -> Any:
        """Broadcast from rank 0."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Process group barrier."""
        dist.barrier()


def local_device() -> torch.device:
    """The GPU of this process's local rank if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", rank % torch.cuda.device_count())


def sum_flat(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sums over all ranks of tensors that have the same shapes there, in few flat float32 all-reduces."""
    totals: list[torch.Tensor] = []
    bucket: list[torch.Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if index == len(tensors) - 1 or sum(t.numel() for t in bucket) >= _BUCKET_ELEMENTS:
            flat = torch.cat([t.reshape(-1).float() for t in bucket])
            dist.all_reduce(flat)
            parts = flat.split([t.numel() for t in bucket])
            totals += [part.view_as(t).to(t.dtype) for part, t in zip(parts, bucket, strict=True)]
            bucket = []
    return totals
