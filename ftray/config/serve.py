"""What an endpoint serves, to whom, and where it listens."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ftray.config.tenant import KeyConfig, TenantConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import Piece, replace, spec

__all__ = ["AutoscaleConfig", "GoldenConfig", "KeyConfig", "ServeConfig", "TenantConfig"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@spec
class AutoscaleConfig:
    """How many copies of the engine there are, by the requests each has."""

    min_replicas: int = Field(default=1, ge=1)
    """Fewest copies."""
    max_replicas: int = Field(default=2, ge=1)
    """Most copies."""
    target_ongoing_requests: float = Field(default=8, gt=0)
    """Requests a copy should have, running and waiting."""
    upscale_delay_s: float = Field(default=10, ge=0)
    """How long there must be too many before a copy is added."""
    downscale_delay_s: float = Field(default=300, ge=0)
    """How long there must be too few before one goes."""

    def __post_init__(self) -> None:
        if self.max_replicas < self.min_replicas:
            raise ConfigError(f"max_replicas: {self.max_replicas} is less than min_replicas; raise it")


@spec
class GoldenConfig:
    """A question that a new version of a delta must get right before it answers anybody."""

    delta: str
    """Name of the delta it is put to, whichever version."""
    prompt: str
    """What is asked, as the user's turn if the base has a chat template."""
    contains: str
    """What the greedy answer must contain."""
    max_tokens: int = Field(default=32, ge=1, le=512)
    """Most tokens of the answer."""


@spec
class ServeConfig:
    """An endpoint: one base, many deltas."""

    base: str
    """Folder or Hub id of the base model."""
    registry: str = "registry"
    """Folder of the delta registry."""
    deltas: list[str] = Field(default_factory=list)
    """What is served: `name` (its newest version, and each alias as `name@alias`), `name@alias` or `name@3`."""
    golden: list[GoldenConfig] = Field(default_factory=list)
    """Questions new versions are put to before they take over."""
    follow_s: float = Field(default=1.0, gt=0, le=60)
    """How often the registry and the tenants' file are looked at, and replicas told."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback needs `tenants` or `tenants_file`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on."""
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the admin API on the head node's loopback (0: a free one); null: there is none."""
    admin_token_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$", repr=False)
    """SHA-256 of the token that the admin API asks for."""
    engine: Annotated[Any, Piece("engine")] = Field(default="torch", validate_default=True)
    """What generates."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of the engine."""
    autoscale: AutoscaleConfig | None = None
    """Let the number of copies follow the load, instead of `num_replicas`."""
    num_http_replicas: int = Field(default=1, ge=1)
    """Copies of the HTTP front, which tokenises and holds no model."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs of each copy, and its threads."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of each copy."""
    tenants: list[TenantConfig] = Field(default_factory=list)
    """Who may ask; with no `tenants_file` either, anyone who reaches the address (loopback only)."""
    tenants_file: str | None = None
    """File of further tenants, which `ftray tenant` and the admin API change while the endpoint runs."""
    metrics_key_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the key that may read `/metrics`, all of it, and nothing else; tenants see their own models."""
    usage_folder: str | None = None
    """Folder that gets a JSON line for every request: tenant, delta, tokens, time; null: none are written."""
    max_queued_requests: int = Field(default=128, ge=0)
    """Answers that wait in each engine beyond those that run; more are answered 429 with `Retry-After`."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    """Longest time one request may take."""
    drain_timeout_s: float = Field(default=30.0, ge=0)
    """How long answers in flight may go on when the endpoint is told to stop; then streams end with an error."""

    def __post_init__(self) -> None:
        if not self.asks_for_keys and self.host not in _LOOPBACK:
            raise ConfigError(f"host: {self.host!r} is reachable by others; add `tenants`, or use 127.0.0.1")
        if self.metrics_key_sha256 and not self.asks_for_keys:
            raise ConfigError("metrics_key_sha256: without `tenants` no key is asked for; leave it out")
        if self.admin_port is not None and self.admin_token_sha256 is None:
            raise ConfigError("admin_port: the admin API needs `admin_token_sha256`; give it")

    def located(self) -> "ServeConfig":
        """The same with local paths made absolute: replicas have working folders of their own."""
        found = self
        for field in ("registry", "tenants_file", "usage_folder"):
            value = getattr(self, field)
            if value and "://" not in value:
                found = replace(found, field, str(Path(value).expanduser().resolve()))
        return found

    @property
    def asks_for_keys(self) -> bool:
        """Whether every request needs a key."""
        return bool(self.tenants or self.tenants_file)
