"""A Ray session: join the cluster that was named, or start a private one for as long as it is needed."""

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from ftray.cluster.reach import reach
from ftray.core.errors import ClusterError, FtrayError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; unset, every driver prints a warning
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}
_WORKER_ENV = {"TOKENIZERS_PARALLELISM": "false"}
_PASSED_ON = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE", "WANDB_PROJECT")
_OBJECT_STORE_BYTES = 512 * 2**20
_SWEEP_AGE_S = 24 * 3600
_WORKERS_END_S = 5.0


@contextlib.contextmanager
def session(
    address: str | None = None, num_cpus: int | None = None, dashboard: bool = False
) -> Iterator[None]:
    """Have a Ray cluster for the length of a `with` block.

    Inside a block that already has one (a nested call, a Ray worker) nothing is started and nothing ended.
    `FTRAY_DEBUG=1` shows Ray's own log and that of the workers, and keeps the log folder of a local cluster.

    Args:
        address: `host:port` of a running cluster; None: `RAY_ADDRESS`, or a local cluster on loopback.
        num_cpus: CPUs of a local cluster; None: all of this machine's. A joined cluster keeps its own.
        dashboard: whether a local cluster has its dashboard and Jobs API (costs about a second).

    Raises:
        ClusterError: if the cluster cannot be reached, refuses the token or does not start.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    with _local(num_cpus, dashboard) if address == "local" else _joined(address):
        yield


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    _reach(address)
    # A submitted job brings its environment in its own runtime_env, which Ray refuses to see set twice.
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    passed = _WORKER_ENV | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    _init(address, {} if in_job else {"runtime_env": {"env_vars": passed}})
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _local(num_cpus: int | None, dashboard: bool) -> Iterator[None]:
    # A private folder: short (its Unix sockets may have 107 bytes), not shared with other users' clusters.
    # The parent is not TMPDIR, which is long on some systems.
    parent = os.environ.get("RAY_TMPDIR") or ("/tmp" if os.access("/tmp", os.W_OK) else None)
    folder = Path(tempfile.mkdtemp(prefix=f"ftray-{os.getpid()}-", dir=parent))
    _sweep(folder.parent)
    keep = _debug()
    settings = {
        "num_cpus": num_cpus,
        "include_dashboard": dashboard,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": str(folder / "ray"),  # Ray opens its own folder to everyone; the one above stays closed
    }
    worker_env = _WORKER_ENV | {ray_constants.RAY_WORKER_NICENESS: "0"}
    try:
        with _environment(_QUIET | worker_env | _token(folder)), _loopback():
            try:
                _init("local", settings)
                yield
            finally:
                workers = _workers()
                ray.shutdown()
                _end(workers)
    except FtrayError:
        raise
    except Exception:
        keep = True  # the workers' logs may say why
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _reach(address: str) -> None:
    """Try the address first: Ray would wait for minutes for a cluster that is not there."""
    if address == "auto":
        return
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdigit():
        raise ClusterError(
            f"{address!r} is not a cluster; name `host:6379`, or unset RAY_ADDRESS for a local one"
        )
    reach(address, host, int(port))


def _sweep(parent: Path) -> None:
    """Remove day-old folders of sessions that were killed before they could; their clusters ended with them."""
    for folder in parent.glob("ftray-*-*"):
        pid = folder.name.split("-")[1]
        with contextlib.suppress(OSError):
            state = folder.stat()
            is_old = time.time() - state.st_mtime > _SWEEP_AGE_S
            if pid.isdigit() and is_old and state.st_uid == os.getuid() and not _is_alive(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _init(address: str, settings: dict[str, Any]) -> None:
    level = logging.INFO if _debug() else logging.ERROR
    try:
        ray.init(address=address, log_to_driver=_debug(), logging_level=level, **settings)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = (
            "check RAY_TMPDIR and free ports"
            if address == "local"
            else "check the address, RAY_AUTH_MODE=token and the token"
        )
        raise ClusterError(f"Ray cluster {address!r}: {reason}; {remedy}") from error


def _token(folder: Path) -> dict[str, str]:
    """Environment that names a token only this user can read; made if there is none.

    Ray would make one itself, readable by everyone on the machine under the usual umask.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return {}
    path = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(FileExistsError, OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_private(path)
    if os.access(path, os.R_OK) and path.stat().st_size:
        if path.stat().st_uid == os.getuid():
            path.chmod(0o600)
        return {}
    path = folder / "auth_token"  # no home folder to write to, as in many containers
    _write_private(path)
    return {"RAY_AUTH_TOKEN_PATH": str(path)}


def _write_private(path: Path) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables where the user set none; a local cluster's processes inherit them."""
    before = dict(os.environ)
    for name, value in values.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in (*values, "RAY_AUTH_MODE"):  # Ray sets the mode when it starts a cluster
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Keep every port of a local cluster on 127.0.0.1.

    Ray replaces 127.0.0.1 by the network card's address unless `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER` is 0, a
    switch it reads once while it is imported: the variable is for the processes it starts, the constant for
    this one.
    """
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled


def _debug() -> bool:
    return os.environ.get("FTRAY_DEBUG", "") not in ("", "0")


def _workers() -> list[psutil.Process]:
    """Ray's worker processes below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RAY_RAYLET_PID" in process.environ():
                found.append(process)
    return found


def _end(workers: list[psutil.Process]) -> None:
    """End the workers that outlive their raylet.

    It ends those it knows of; a Ray Train controller that hung in its own exit has been seen to stay behind.
    """
    _, alive = psutil.wait_procs(workers, timeout=_WORKERS_END_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
