"""Run a function on several ranks of a gloo process group, as Ray Train's workers would be, without Ray."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on each rank of a new gloo group on loopback; returns the results by rank.

    The function and its arguments must pickle (a module-level function). An exception on a rank is raised here.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_rank, (world_size, port, function, args, results), nprocs=world_size)  # type: ignore[attr-defined]
    found = dict(results.get() for _ in range(world_size))
    return [found[rank] for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        results.put((rank, function(*args)))
    finally:
        if dist.is_initialized():  # not if the function failed inside `in_group`
            dist.destroy_process_group()


def in_group(size: int, meeting: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` on the first `size` ranks, as a process group of their own; called on every rank.

    Several groups in one start of the ranks are much quicker than a start for each.

    Args:
        size: ranks of the smaller group.
        meeting: a path that no file has yet and all ranks see.
        function: what to call.
        args: its arguments.

    Returns:
        What it returned, and None on the ranks that are not in the group; all return together.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    found = None
    if rank < size:
        dist.init_process_group("gloo", init_method=f"file://{meeting}.part", rank=rank, world_size=size)
        dist.barrier()
        try:
            found = function(*args)
        finally:
            dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    dist.barrier()  # nobody leaves the group before all are connected
    return found
