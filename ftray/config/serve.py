"""What an endpoint serves, to whom, and where it listens."""

from typing import Annotated, Any

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import Piece, spec
from ftray.core.types import is_name


@spec
class TenantConfig:
    """One tenant: a key and the deltas it may use."""

    name: str
    """The tenant's name."""
    key_sha256: str = Field(pattern="^[0-9a-f]{64}$", repr=False)
    """SHA-256 of the tenant's key in hexadecimal; the key itself is never written down."""
    deltas: list[str] = Field(default_factory=list)
    """Names of the deltas this tenant sees, besides the base."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError(
                f"name: {self.name!r} is refused; use lower-case letters, digits, `.`, `_`, `-`"
            )


@spec
class ServeConfig:
    """An endpoint: one base, many deltas."""

    base: str
    """Folder or Hub id of the base model."""
    registry: str = "registry"
    """Folder of the delta registry."""
    deltas: list[str] = Field(default_factory=list)
    """What is served: `name`, `name@3` or `name@alias`; a bare name is its newest version."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback needs `tenants`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on."""
    engine: Annotated[Any, Piece("engine")] = Field(default="torch", validate_default=True)
    """What generates."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of the engine."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs of each copy, and its threads."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of each copy."""
    tenants: list[TenantConfig] = Field(default_factory=list)
    """Who may ask; empty: anyone who reaches the address (loopback only)."""
    metrics_key_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the key that may read `/metrics`, all of it, and nothing else; tenants see their own models."""
    max_queued_requests: int = Field(default=128, ge=0)
    """Requests that wait in each engine beyond those that run; more are answered 429 with `Retry-After`."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    """Longest time one request may take."""

    def __post_init__(self) -> None:
        if not self.tenants and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError(f"host: {self.host!r} is reachable by others; add `tenants`, or use 127.0.0.1")
        if self.metrics_key_sha256 and not self.tenants:
            raise ConfigError("metrics_key_sha256: without `tenants` no key is asked for; leave it out")
