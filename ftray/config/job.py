"""A job for a Ray cluster: which verb on which file, what is sent along, what it needs there."""

import re
from typing import Literal

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.core.types import is_name

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE
)


@spec
class JobResources:
    """What the job's driver reserves on a node; its workers ask for their own."""

    num_cpus: float | None = Field(default=None, ge=0)
    """CPUs; null: the driver runs on the head node and reserves none."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs."""
    memory_bytes: int | None = Field(default=None, ge=1)
    """Memory in bytes."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Custom resources of the cluster."""


@spec
class JobConfig:
    """One `ftray` command that a Ray cluster runs."""

    name: str
    """The job's id begins with it: lower-case letters, digits, `.`, `_`, `-`."""
    verb: Literal["run", "tune", "eval", "serve", "check", "version"] = "run"
    """The `ftray` command."""
    config: str = ""
    """The verb's file: a recipe, a search, an endpoint."""
    arguments: list[str] = Field(default_factory=list)
    """What follows the file on the command line: `a.b=c` overrides and options such as `--resume`."""
    working_dir: str = ""
    """Folder sent to the cluster; empty: only `config` and the local files it names."""
    files: list[str] = Field(default_factory=list)
    """More local files and folders to send."""
    max_upload_mb: int = Field(default=100, ge=1, le=500)
    """Megabytes that may be sent; larger things belong on storage the cluster reads."""
    resources: JobResources = Field(default_factory=JobResources)
    """What the driver reserves."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the job. Everyone who may list jobs can read it, so it holds no secrets."""
    secrets: list[str] = Field(default_factory=list)
    """Names of variables the cluster's nodes must have set; the job fails at once without them."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError(
                f"name: {self.name!r} is refused; use lower-case letters, digits, `.`, `_`, `-`"
            )
        if not self.config and self.verb != "version":
            raise ConfigError(f"config: missing; name the file that `ftray {self.verb}` takes")
        for name in [*self.env, *self.secrets]:
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(f"env: {name!r} is not a variable name; use letters, digits and `_`")
        for name in self.env:
            if _SECRET.search(name):
                raise ConfigError(
                    f"env: {name} looks like a secret; set it on the nodes and list it in `secrets`"
                )
