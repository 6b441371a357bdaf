"""What the replicas of an endpoint are given."""

from pathlib import Path
from typing import Any

import pytest

from ftray.config.serve import AutoscaleConfig, ServeConfig
from ftray.serve.ray_app import _application


def test_replicas_get_their_share_and_the_base_where_it_really_is(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_base.parent)
    ingress: Any = _application(ServeConfig(base=tiny_base.name, num_cpus=3, num_gpus=0.5))
    config, engine, control = ingress._bound_deployment.init_args
    replica = engine._bound_deployment
    assert replica.ray_actor_options.items() >= {"num_cpus": 3.0, "num_gpus": 0.5}.items()
    assert replica.init_args[0].base == config.base == str(tiny_base.resolve())
    assert config.registry == str(tiny_base.parent.resolve() / "registry")
    assert replica.init_args[1] is control  # one control for all


def test_a_base_of_the_hub_and_a_remote_registry_are_left_to_each_node() -> None:
    ingress: Any = _application(ServeConfig(base="someone/model", registry="s3://bucket/registry"))
    config = ingress._bound_deployment.init_args[0]
    assert (config.base, config.registry) == ("someone/model", "s3://bucket/registry")


def test_the_number_of_copies_may_follow_the_load() -> None:
    autoscale = AutoscaleConfig(min_replicas=2, max_replicas=5, target_ongoing_requests=3)
    ingress: Any = _application(ServeConfig(base="someone/model", autoscale=autoscale))
    found = ingress._bound_deployment.init_args[1]._bound_deployment._deployment_config.autoscaling_config
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (2, 5, 3.0)
