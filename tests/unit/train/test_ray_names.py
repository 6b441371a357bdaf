"""What is used of Ray Train that is not its public interface is still where it was."""

import inspect

from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import ExecutionContext, TrainContext, get_train_context
from ray.train.v2._internal.execution.worker_group import thread_runner

from ftray.train import ray_io


def test_names_of_ray_train() -> None:
    """An upgrade that moves them must fail here, not end a preempted worker without its checkpoint."""
    assert ray_io.get_train_context is get_train_context
    assert "execution_context" in TrainContext.__annotations__
    assert "training_thread_runner" in ExecutionContext.__annotations__
    assert thread_runner.ThreadRunner()._thread is None, "before it is started"
    called = {name for name, found in vars(ray_io.Orderly).items() if inspect.isfunction(found)}
    assert called == {"after_init_train_context", "before_worker_shutdown"}
    assert all(hasattr(WorkerCallback, name) for name in called)
