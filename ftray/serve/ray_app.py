"""Start and stop an endpoint on Ray Serve."""

import contextlib
import logging
import os
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from ftray.config.load import load
from ftray.config.serve import ServeConfig
from ftray.core.errors import ClusterError, ConfigError
from ftray.serve.backend import ServedModel
from ftray.serve.models import resolve_models
from ftray.serve.ray_ingress import Ingress
from ftray.serve.ray_replica import EngineReplica

_APP = "ftray"
_HEALTHY_WITHIN_S = 60.0


@dataclass(frozen=True)
class Handle:
    """A running endpoint."""

    url: str
    """Where it answers, without `/v1`."""
    models: list[ServedModel]
    """What it serves."""

    def stop(self) -> None:
        """Let answers in flight end for up to five seconds, then stop what serves; other applications stay."""
        if set(serve.status().applications) - {_APP}:
            serve.delete(_APP)
        else:
            _shutdown()


def build(args: dict[str, str]) -> Application:
    """The application for Ray Serve's own deployers (`serve deploy`, KubeRay's RayService).

    Args:
        args: `{"config": "path/to/serve.yaml"}`. The deployer decides host and port; the file's `host` says
            how far it reaches, so that a wide one still needs tenants.
    """
    if set(args) != {"config"}:
        raise ConfigError(f"args: {sorted(args)} is refused; write `args: {{config: path/to/serve.yaml}}`")
    config = load(ServeConfig, args["config"])
    return _application(config, resolve_models(config))


def _application(config: ServeConfig, models: list[ServedModel]) -> Application:
    engine = EngineReplica.options(num_replicas=config.num_replicas).bind(config, models)  # type: ignore[attr-defined]
    return Ingress.bind(config, models, engine)  # type: ignore[attr-defined]


def run(config: ServeConfig) -> Handle:
    """Serve a base and its deltas on the Ray session of this process; returns when it answers.

    Raises:
        ConfigError, ModelError, DeltaError, RegistryError: for what the configuration names; before anything
            is started.
        ClusterError: if there is no session, or Ray Serve cannot start it.
    """
    if not ray.is_initialized():
        raise ClusterError("serve: there is no Ray session; open one with `session()` first")
    models = resolve_models(config)
    port = _free_port(config)
    if os.environ.get("FTRAY_DEBUG", "0") in ("", "0"):
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=config.host, port=port),
            logging_config=quiet,
        )
        serve.run(_application(config, models), name=_APP, route_prefix="/", logging_config=quiet)
        handle = Handle(f"http://{_reachable(config.host)}:{port}", models)
        _wait_healthy(handle.url)
    except (RayError, RuntimeError, TimeoutError) as error:
        with contextlib.suppress(RayError, RuntimeError):
            _shutdown()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else type(error).__name__
        raise ClusterError(f"serve: Ray Serve could not start the endpoint: {reason}") from error
    return handle


def _shutdown() -> None:
    """Stop Ray Serve.

    The controller ends itself while it answers, and Ray tells the user that it will retry the call for ever;
    asked for no retry first, it goes in silence.
    """
    with contextlib.suppress(ValueError, RayError):
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=30)
    serve.shutdown()


def _free_port(config: ServeConfig) -> int:
    """The port asked for, or a free one for 0."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            reason = f"{config.host}:{config.port} cannot be bound ({error.strerror})"
            raise ConfigError(f"port: {reason}; free it or choose another") from None
        return int(probe.getsockname()[1])


def _reachable(host: str) -> str:
    """A host to connect to for one to listen on."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _wait_healthy(url: str) -> None:
    until = time.monotonic() + _HEALTHY_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > until:
                raise TimeoutError(f"{url}/healthz does not answer") from None
            time.sleep(0.1)
