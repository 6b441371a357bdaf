"""Run a function on several ranks of a gloo process group, as Ray Train's workers would be, without Ray."""

import atexit
import contextlib
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, fresh: bool = False) -> list[Any]:
    """Call `function(*args)` on each rank of a new gloo group on loopback; returns the results by rank.

    The processes are kept for the next call, since most of a short test would be their imports: what a function
    changes in its process (not in its group) is there for the next one. `end_ranks` ends them.

    Args:
        world_size: ranks of the group.
        function: what to call; it and its arguments must pickle (a module-level function).
        args: its arguments.
        fresh: in new processes, which end with the call, as whatever measures memory or needs an environment must.

    Raises:
        RuntimeError: with the traceback of a rank that failed; the processes are gone then.
    """
    ranks = _Ranks() if fresh else _KEPT
    try:
        return ranks.call(world_size, function, args)
    finally:
        if fresh:
            ranks.end()


def end_ranks() -> None:
    """End the processes that are kept."""
    _KEPT.end()


class _Ranks:
    """Processes that wait for something to call."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []

    def call(self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        while len(self._ranks) < world_size:
            self._start()
        connections = [connection for _, connection in self._ranks[:world_size]]
        try:
            with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
                for rank, connection in enumerate(connections):
                    connection.send((rank, world_size, f"{folder}/meeting", function, args))
                return _results(connections)
        except BaseException:
            self.end()  # those that did not fail may wait for the one that did
            raise

    def end(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
        for process, _ in self._ranks:
            process.join()
        self._ranks = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        mine, its = context.Pipe()
        process = context.Process(target=_serve, args=(its,))
        process.start()
        its.close()
        self._ranks.append((process, mine))


def _results(connections: list[Connection]) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(connections):
        for connection in wait([c for rank, c in enumerate(connections) if rank not in found]):
            rank = connections.index(connection)  # type: ignore[arg-type]
            try:
                failed, found[rank] = connections[rank].recv()
            except (EOFError, ConnectionError):
                raise RuntimeError(f"rank {rank} ended without an answer") from None
            if failed:
                raise RuntimeError(f"rank {rank} failed\n{failed}")
    return [found[rank] for rank in range(len(connections))]


def _serve(connection: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, meeting, function, args = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
            dist.barrier()  # nobody leaves the group before all are connected
            found = function(*args)
            _leave()
            connection.send((None, found))
        except BaseException:
            with contextlib.suppress(OSError):
                connection.send((traceback.format_exc(), None))


def _leave() -> None:
    """Leave the process group, and let DeepSpeed forget it, which keeps the first one of a process for good."""
    dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        importlib.reload(sys.modules["deepspeed.utils.groups"])
        vars(sys.modules["deepspeed.comm.comm"])["cdb"] = None


_KEPT = _Ranks()
atexit.register(end_ranks)


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
    _leave()
    found = None
    if rank < size:
        dist.init_process_group("gloo", init_method=f"file://{meeting}.part", rank=rank, world_size=size)
        dist.barrier()
        try:
            found = function(*args)
        finally:
            _leave()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    dist.barrier()  # nobody leaves the group before all are connected
    return found
