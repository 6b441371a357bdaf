"""Start and stop an endpoint on Ray Serve."""

import contextlib
import logging
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from ftray.config.load import load
from ftray.config.serve import ServeConfig
from ftray.core.errors import ClusterError, ConfigError, DeltaError
from ftray.core.spec import dump, replace
from ftray.model.folder import resolve_folder
from ftray.serve.backend import ServedModel
from ftray.serve.models import resolve_models
from ftray.serve.ray_control import ControlReplica
from ftray.serve.ray_head import free_port, on_head, url_of, wait_healthy
from ftray.serve.ray_ingress import Ingress
from ftray.serve.ray_replica import EngineReplica

_APP = "ftray"
_HEALTHY_WITHIN_S = 60.0
_ERRORS_OUT_S = 5.0
"""How long streams that are ended have for the error that says so."""
_ONE_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Replicas hand every token from thread to thread otherwise; nothing of ours keeps an event loop busy for long."""


@dataclass(frozen=True)
class Handle:
    """A running endpoint."""

    url: str
    """Where it answers, without `/v1`."""
    models: list[ServedModel]
    """What it served at the start."""
    admin_port: int | None = None
    """Port of the admin API on the head node's loopback."""
    drain_timeout_s: float = 30.0
    """How long `stop` lets answers in flight go on."""

    def stop(self) -> None:
        """Take no more requests, let those in flight end, then stop what serves; other applications stay."""
        with contextlib.suppress(RayError, RayServeException, RuntimeError, TimeoutError):
            _drain(self.drain_timeout_s)
        _stop()


def build(args: dict[str, str]) -> Application:
    """The application for Ray Serve's own deployers (`serve deploy`, KubeRay's RayService).

    Args:
        args: `{"config": "path/to/serve.yaml"}`. The deployer decides host and port, and may listen to all the
            world, so the file must name tenants.
    """
    if set(args) != {"config"}:
        raise ConfigError(f"args: {sorted(args)} is refused; write `args: {{config: path/to/serve.yaml}}`")
    config = load(ServeConfig, args["config"])
    if not config.asks_for_keys:
        raise ConfigError(f"{args['config']}: tenants: missing; whoever reaches the deployer's port may ask")
    resolve_models(config)
    return _application(config)


def _application(config: ServeConfig) -> Application:
    if Path(config.base).expanduser().is_dir():  # replicas have working folders of their own
        config = replace(config, "base", str(resolve_folder(config.base)))
    config = config.located()
    control = ControlReplica.bind(config, uuid.uuid4().hex)  # type: ignore[attr-defined]
    engine = EngineReplica.options(  # type: ignore[attr-defined]
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            "runtime_env": {"env_vars": _ONE_LOOP},
        },
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        **_copies(config),
    ).bind(config, control)
    http = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=config.num_http_replicas,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _ONE_LOOP}},
        # An engine's end comes first, so that a front is there to tell its clients.
        graceful_shutdown_timeout_s=config.drain_timeout_s + _ERRORS_OUT_S,
    )
    return http.bind(config, engine, control)


def _copies(config: ServeConfig) -> dict[str, Any]:
    """How many engine replicas there are, in Ray Serve's words."""
    if config.autoscale is None:
        return {"num_replicas": config.num_replicas}
    return {"autoscaling_config": AutoscalingConfig(**dump(config.autoscale))}


def run(config: ServeConfig) -> Handle:
    """Serve a base and its deltas on the Ray session of this process; returns when it answers.

    Raises:
        ConfigError, ModelError, DeltaError, RegistryError: for what the configuration names; before anything
            is started.
        ClusterError: if there is no session, the cluster serves something already that is in the way, or Ray
            Serve cannot start it.
    """
    if not ray.is_initialized():
        raise ClusterError("serve: there is no Ray session; open one with `session()` first")
    models = resolve_models(config)
    port = _port(config)
    if os.environ.get("FTRAY_DEBUG", "0") in ("", "0"):
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=config.host, port=port),
            logging_config=quiet,
        )
        serve.run(_application(config), name=_APP, route_prefix="/", logging_config=quiet)
        url = url_of(config.host, port)
        on_head(wait_healthy, url, _HEALTHY_WITHIN_S)
        admin = _wait_loaded(models, _HEALTHY_WITHIN_S)
        handle = Handle(url, models, admin, config.drain_timeout_s)
    except DeltaError:
        _stop()
        raise
    except (RayError, RuntimeError, TimeoutError) as error:
        with contextlib.suppress(RayError, RuntimeError):
            _stop()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else type(error).__name__
        raise ClusterError(f"serve: Ray Serve could not start the endpoint: {reason}") from error
    return handle


def _wait_loaded(models: list[ServedModel], within_s: float) -> int | None:
    """Wait until everything is live; returns the admin API's port. Raises `DeltaError` for what is refused."""
    control = serve.get_deployment_handle("control", _APP)
    until = time.monotonic() + within_s
    while True:
        status: Any = control.status.remote().result(timeout_s=30)
        for row in status["rejected"]:
            raise DeltaError(f"deltas: {row['problem']}")
        live = {row["id"] for row in status["models"]}
        if live.issuperset(model.id for model in models):
            port: int | None = status["admin_port"]
            return port
        if time.monotonic() > until:
            raise TimeoutError(f"{', '.join(row['id'] for row in status['pending'])}: not loaded in time")
        time.sleep(0.05)


def _drain(within_s: float) -> None:
    """Have the fronts take no more requests and wait for those they have; what is left then ends with an error."""
    control = serve.get_deployment_handle("control", _APP)
    until = time.monotonic() + within_s
    ended = False
    while control.drain.remote().result(timeout_s=5):
        if time.monotonic() > until:
            if ended:
                return
            control.end.remote().result(timeout_s=5)
            ended, until = True, time.monotonic() + _ERRORS_OUT_S
        time.sleep(0.1)


def _port(config: ServeConfig) -> int:
    """The port to serve on, where nothing is in the way; 0 becomes a free one, or Ray Serve's if it runs."""
    controller = _controller()
    if controller is None:
        return on_head(free_port, config.host, config.port)
    options = ray.get(controller.get_http_config.remote(), timeout=30)
    there = f"{options.host}:{options.port}"
    if _APP in serve.status().applications:
        raise ClusterError(f"serve: this cluster has an endpoint already, at {there}; stop it first")
    if (options.host, options.port) != (config.host, config.port or options.port):
        asked = f"{config.host}:{config.port}"
        raise ClusterError(f"serve: Ray Serve listens at {there} on this cluster, not at {asked}; use that")
    return int(options.port)


def _stop() -> None:
    """Stop our application, and Ray Serve itself if there is no other."""
    if set(serve.status().applications) - {_APP}:
        serve.delete(_APP)
    else:
        _shutdown()


def _controller() -> Any:
    """Ray Serve's controller; None if it does not run."""
    try:
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None


def _shutdown() -> None:
    """Stop Ray Serve.

    The controller ends itself while it answers, and Ray tells the user that it will retry the call for ever;
    asked for no retry first, it goes in silence.
    """
    with contextlib.suppress(RayError):
        if controller := _controller():
            ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=30)
    serve.shutdown()
