"""`ftray doctor --address`: every node of a cluster is asked."""

import pytest
import ray

from ftray.cluster.ray_nodes import inspect_nodes

pytestmark = pytest.mark.ray


def test_every_node_is_inspected(ray_cluster: None) -> None:
    (name,) = inspect_nodes("auto")
    (node,) = ray.nodes()
    assert node["NodeManagerHostname"] in name
    found = {finding.name: finding for finding in inspect_nodes("auto")[name]}
    assert "CPU 2" in found["Ray resources"].value
    assert found["torch"].level == found["memory"].level == "ok"
