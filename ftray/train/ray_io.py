"""A run inside a Ray Train worker: shards prepared by the driver, checkpoints told to Ray, notices heard."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import ray.train
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

from ftray.config.recipe import Recipe
from ftray.data.store import Folder
from ftray.train.io import LocalIO, Record

_SHUTDOWN_PATIENCE_S = 4.5  # Ray Train ends a worker five seconds after it has told it


class RayIO(LocalIO):
    """`LocalIO` on a folder all workers share.

    Step metrics go to the run folder directly: `ray.train.report` blocks for about two seconds a call, so Ray
    hears of a run at its checkpoints only.

    Args:
        run_dir: the run's folder, on storage all nodes see.
        shards: folders of the prepared training and validation shards.
    """

    def __init__(self, run_dir: Path, shards: tuple[Folder, Folder | None]) -> None:
        super().__init__(run_dir)
        self._shards = shards

    def prepare(self, recipe: Recipe) -> tuple[Folder, Folder | None]:
        """What the driver prepared with Ray Data."""
        return self._shards

    def committed(self, record: Record) -> None:
        """Report the metrics; the checkpoint itself is our own transaction and needs no copy by Ray."""
        metrics: dict[str, Any] = {key: value for key, value in record.items() if value is not None}
        ray.train.report(metrics)

    def stop_reason(self) -> str | None:
        """A signal to this worker, the loss of its node foretold, a change of the group, or the driver's word.

        Ray's public `get_preemption_info` is a collective call through an actor; what it would answer lies in
        this process, and the ranks agree by their own sum.
        """
        notice = get_train_context().preemption_context.preemption_info
        if notice is not None:
            return f"preemption of {len(notice.preempted_node_ids)} node(s)"
        return Orderly.reason or super().stop_reason()


class Orderly(WorkerCallback):
    """Lets a worker that is asked to end do so after its step and a checkpoint.

    Signals are heard by a process's main thread, which in a worker is Ray's; this callback runs there. A group
    that is resized is told too, and has a few seconds: what it has trained is not lost then.
    """

    reason: str | None = None
    """Why this worker's process is asked to end."""

    def after_init_train_context(self) -> None:
        """Hear SIGTERM, in place of Ray's handler, which ends the process at once."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _sigterm)

    def before_worker_shutdown(self) -> None:
        """Ask, and wait for the training function to return."""
        Orderly.reason = Orderly.reason or "a change of the worker group"
        thread = get_train_context().execution_context.training_thread_runner._thread
        if thread is not None:
            thread.join(_SHUTDOWN_PATIENCE_S)


def _sigterm(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    Orderly.reason = "SIGTERM to a worker"
