"""A Ray Train worker group: started, restarted, resized, and ended with what the user is to know."""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ftray.cluster import allocator
from ftray.cluster.ray_room import wait_for_room
from ftray.config.recipe import Recipe
from ftray.core import errors
from ftray.core.errors import FtrayError, GroupFailed, RunStopped, TrainError
from ftray.core.fs import read_json, write_bytes, write_json
from ftray.strategy.elastic import bounds
from ftray.train.io import STOPPED, Record
from ftray.train.run import stopped_after
from ftray.train.stop import FILE as STOP
from ftray.train.stop import Stop
from ftray.train.tail import Tail
from ftray.train.track.jsonl import FILE as METRICS
from ftray.train.watchdog import hung

MISTAKE = "mistake.json"
"""Written by a worker that meets a user's mistake, read and removed by the driver."""

Body = Callable[[], object]
"""What every worker of a group calls; pickles."""

_RAY_SETTINGS = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
_START_S = 120
"""A group that cannot start for lack of room should say so in minutes, not hang."""
_TRY_S = 10
"""Then a group whose number is free is tried with another: Ray counts drained and dead nodes for a while."""
_ASK_EVERY_S = 0.2
_COLLECTIVE_MARGIN_S = 60


def run_group(
    recipe: Recipe,
    run_dir: Path,
    cwd: Path,
    cpus_per_worker: float,
    body: Body,
    on_record: Callable[[Record], None] | None = None,
) -> None:
    """Have the workers of a group call a function, again after each notice that ended them in order.

    Args:
        recipe: says how the group is made and watched over.
        run_dir: the group's folder, where it is asked to end and leaves word that it did.
        cwd: where the workers work, if their nodes have that folder.
        cpus_per_worker: CPUs that each claims.
        body: the function.
        on_record: called with what is appended to the metrics in `run_dir`.

    Raises:
        RunStopped: if this process was asked to end; a checkpoint holds every step.
        GroupFailed: if it failed more than `max_failures` times, hung or found no room.
        FtrayError: a user's mistake that a worker met.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    config = {"run_dir": str(run_dir), "cwd": str(cwd), "body": body}
    strategy = recipe.strategy
    least, most = bounds(strategy.num_workers)
    # Once for the whole run: a group that has lost a node waits for GPUs again and does not go on without.
    resources = resources_of(least, cpus_per_worker)
    stop = Stop(run_dir)
    begun: list[int] = []
    try:
        with Tail(run_dir / METRICS, on_record), _ray_settings(_START_S if least == most else _TRY_S):
            while True:
                for name in (MISTAKE, STOPPED):
                    (run_dir / name).unlink(missing_ok=True)
                _fit(_trainer(recipe, run_dir, resources, config), run_dir, stop)
                if not (run_dir / STOPPED).exists():
                    return
                stopped = read_json(run_dir / STOPPED)
                steps: list[int] = stopped["steps"]
                if stop.reason or not advanced(steps, begun):
                    # Which worker saw the request first is chance; who made it is known here.
                    reason = stop.reason or stopped["reason"]
                    raise RunStopped(stopped_after(recipe.name, max(steps), reason), stop.signum)
                begun = steps
                wait_for_room(
                    least, resources, strategy.wait_for_room_s, until=lambda: stop.reason is not None
                )
                if stop.reason:
                    raise RunStopped(stopped_after(recipe.name, max(begun), stop.reason), stop.signum)
    finally:
        stop.close()
        (run_dir / STOP).unlink(missing_ok=True)


def advanced(steps: Sequence[int], begun: Sequence[int]) -> bool:
    """True if any of what a group trains is further than at the notice before, which may have ended others."""
    return not begun or any(now > then for now, then in zip(steps, begun, strict=True))


@contextlib.contextmanager
def _ray_settings(start_s: float) -> Iterator[None]:
    """Inside the block Ray Train has our settings where the user made none; it passes them on to its processes."""
    wanted = {**_RAY_SETTINGS, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_s)}
    ours = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            os.environ.pop(key, None)


def resources_of(least: int, cpus_per_worker: float) -> dict[str, float]:
    """What a worker claims: CPUs, and a GPU where the cluster has one for each of the least workers."""
    import ray

    has_gpus = ray.cluster_resources().get("GPU", 0) >= least
    return {"CPU": cpus_per_worker} | ({"GPU": 1.0} if has_gpus else {})


def _trainer(recipe: Recipe, run_dir: Path, resources: dict[str, float], config: dict[str, Any]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from ftray.train.ray_io import Orderly

    strategy, settings = recipe.strategy, recipe.train
    least, most = bounds(strategy.num_workers)
    # A rank that waits for one that hangs is found by its own guard; this is for runs that have none.
    timeout_s = 1800 if settings.watchdog_s is None else settings.watchdog_slow_s + _COLLECTIVE_MARGIN_S
    scaling: dict[str, Any] = {
        "num_workers": most if least == most else (least, most),
        "elastic_resize_monitor_interval_s": settings.elastic_interval_s,
        "resources_per_worker": resources,
        "use_gpu": "GPU" in resources,
    }
    # Of a group whose number is free, Ray starts as many as there is room for and counts no failure.
    starts = math.ceil(strategy.wait_for_room_s / _START_S) if least == most else -1
    failing: dict[str, Any] = {"max_failures": strategy.max_failures, "controller_failure_limit": starts}
    running: dict[str, Any] = {
        "name": "ray",
        "storage_path": str(run_dir),
        "failure_config": FailureConfig(**failing),
        "worker_runtime_env": {"env_vars": allocator.environment()},
        "callbacks": [Orderly()],
    }
    return TorchTrainer(
        _worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(**scaling),
        torch_config=TorchConfig(timeout_s=int(timeout_s)),
        run_config=RunConfig(**running),
    )


def _fit(trainer: Any, run_dir: Path, stop: Stop) -> None:
    """Wait for the group; a signal to this process becomes a file the workers see.

    The waiting is another thread's, since Ray Train's own handler of SIGINT would end the group where it stands.
    """
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=fit, name="ftray-fit", daemon=True)
    thread.start()
    told = False
    while thread.is_alive():
        thread.join(_ASK_EVERY_S)
        if stop.reason and not told:
            told = True
            write_bytes(run_dir / STOP, stop.reason.encode())
    if mistake := read_error(run_dir / MISTAKE):
        raise mistake
    if failed:
        found = hung(run_dir)
        raise GroupFailed(found or _told(failed[0])) from failed[0]


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker.

    Ray Train starts a failed group again, which is right for a machine's fault and no use for a user's mistake:
    that one is written down, and the next group ends at once for the driver to tell it.
    """
    import torch

    run_dir = Path(config["run_dir"])
    if (run_dir / MISTAKE).exists():
        return
    # Ray starts workers in a folder of its own; the recipe's relative paths and modules mean the driver's.
    if Path(config["cwd"]).is_dir():
        os.chdir(config["cwd"])
        sys.path.insert(0, config["cwd"])
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    try:
        config["body"]()
    except RunStopped:
        return  # rank 0 wrote down where; the driver decides what follows
    except FtrayError as error:
        with contextlib.suppress(OSError):  # a full disk: then the group's failure tells it
            write_error(run_dir / MISTAKE, error)
        raise


def write_error(path: Path, error: FtrayError) -> None:
    """Leave an error in a file for the driver of a group."""
    write_json(path, {"type": type(error).__name__, "message": str(error)})


def read_error(path: Path) -> FtrayError | None:
    """The error that a worker left in a file, which is removed; None if it left none."""
    if not path.exists():
        return None
    told = read_json(path)
    path.unlink()
    found: FtrayError = getattr(errors, told["type"], TrainError)(told["message"])
    return found


def _told(error: BaseException) -> str:
    """One line that names the last cause of a worker group's failure."""
    failures = getattr(error, "worker_failures", {})
    shown = next(iter(failures.values()), error)
    lines = str(shown).strip().splitlines()
    return f"the worker group failed: {lines[-1] if lines else type(shown).__name__}"
