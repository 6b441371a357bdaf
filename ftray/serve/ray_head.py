"""What has to happen where Ray Serve's proxy listens: on the head node, which need not be this machine."""

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.core.errors import ClusterError, ConfigError

T = TypeVar("T")


def on_head(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on the head node, which may have no CPU to offer; what it raises is raised here."""
    node_id = _head()["NodeID"]
    if node_id == ray.get_runtime_context().get_node_id():
        return function(*arguments)
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(function)
    try:
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
        result: T = ray.get(task.options(**options).remote(*arguments))
    except RayTaskError as error:
        raise error.cause from None
    return result


def url_of(host: str, port: int) -> str:
    """Where an endpoint on the head node answers that listens on a host and port."""
    host = str(_head()["NodeManagerAddress"]) if host in ("0.0.0.0", "::") else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def free_port(host: str, port: int) -> int:
    """The port asked for, or a free one for 0; `ConfigError` if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"{host}:{port} cannot be bound ({error.strerror})"
            raise ConfigError(f"port: {reason}; free it or choose another") from None
        return int(probe.getsockname()[1])


def wait_healthy(url: str, within_s: float) -> None:
    """Wait until an endpoint says it is well; `TimeoutError` if it does not."""
    until = time.monotonic() + within_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > until:
                raise TimeoutError(f"{url}/healthz does not answer") from None
            time.sleep(0.1)


def _head() -> dict[str, Any]:
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return dict(node)
    raise ClusterError("serve: the cluster has no head node that is alive; look at `ray status`")
