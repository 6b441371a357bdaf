"""The machines of a cluster, each inspected on the spot."""

import dataclasses
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.cluster.machine import Finding, inspect
from ftray.cluster.ray_session import session

_TIMEOUT_S = 120.0


def inspect_nodes(address: str) -> dict[str, list[Finding]]:
    """What each living node of a cluster has.

    Raises:
        ClusterError: if the cluster cannot be reached or refuses the token.
    """
    with session(address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        tasks = {_name(node): _inspect_on(node["NodeID"]) for node in nodes}
        return {name: _resources(node) + _result(tasks[name]) for node in nodes for name in [_name(node)]}


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def _inspect_on(node_id: str) -> Any:
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # No CPU of its own: it must run on a machine that is busy, too.
    return ray.remote(_inspect).options(num_cpus=0, scheduling_strategy=where).remote()


def _inspect() -> list[dict[str, str]]:
    return [dataclasses.asdict(finding) for finding in inspect()]


def _resources(node: dict[str, Any]) -> list[Finding]:
    names = sorted(name for name in node["Resources"] if not name.startswith("node:"))
    text = ", ".join(f"{name} {_amount(name, node['Resources'][name])}" for name in names)
    return [Finding("Ray resources", "ok", text)]


def _amount(name: str, value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if "memory" in name else f"{value:g}"


def _result(task: Any) -> list[Finding]:
    try:
        return [Finding(**found) for found in ray.get(task, timeout=_TIMEOUT_S)]
    except (RayError, GetTimeoutError) as error:
        reason = " ".join(str(error).split())[:160]
        remedy = "ftray must be installed there in the same version; see the node's Ray log"
        return [Finding("inspection", "error", reason or type(error).__name__, remedy)]
