"""What the replicas of an endpoint are given."""

from pathlib import Path
from typing import Any

import pytest

from ftray.config.serve import ServeConfig
from ftray.serve.ray_app import _application


def test_replicas_get_their_share_and_the_base_where_it_really_is(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_base.parent)
    ingress: Any = _application(ServeConfig(base=tiny_base.name, num_cpus=3, num_gpus=0.5), [])
    config, _, engine = ingress._bound_deployment.init_args
    replica = engine._bound_deployment
    assert replica.ray_actor_options == {"num_cpus": 3.0, "num_gpus": 0.5}
    assert replica.init_args[0].base == config.base == str(tiny_base.resolve())


def test_a_base_of_the_hub_is_left_to_each_node() -> None:
    ingress: Any = _application(ServeConfig(base="someone/model"), [])
    assert ingress._bound_deployment.init_args[0].base == "someone/model"
