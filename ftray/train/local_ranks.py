"""A process group of this machine's CPUs, without Ray: for checks, not for training."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from ftray.core import errors
from ftray.core.errors import FtrayError, TrainError


def call_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` on every rank of a new gloo group on loopback; returns rank 0's result.

    Function and arguments must pickle. A `FtrayError` of a rank is raised here, as one of its kind.

    Raises:
        TrainError: if a rank ends in any other way.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    group: Any = mp.spawn(  # type: ignore[attr-defined]
        _rank, (world_size, port, function, args, results), nprocs=world_size, join=False
    )
    try:
        while not group.join():
            pass
    except Exception as error:  # what torch raises for a rank that failed holds its traceback as text
        while not results.empty():
            kind, value = results.get()
            if kind != "result":
                found: FtrayError = getattr(errors, kind, TrainError)(value)
                raise found from None
        lines = str(error).strip().splitlines()
        raise TrainError(f"a rank of {world_size} failed: {lines[-1] if lines else error}") from error
    return results.get()[1]


def _rank(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used, which is later
    torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        found = function(*args)
        if rank == 0:
            results.put(("result", found))
    except FtrayError as error:
        results.put((type(error).__name__, str(error)))
        raise
    finally:
        dist.destroy_process_group()
