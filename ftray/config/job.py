"""A job for a Ray cluster: which verb on which file, what is sent along, what it needs there."""

import re
from typing import Literal

from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.core.types import is_name

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Words of a name, between `_`, `.` and `-`: long ones may end a longer word (PGPASSWORD), short ones stand alone. A
# hash of a key (KEY_SHA256) and a plural (MAX_TOKENS) are none, TOKENIZERS_PARALLELISM is another word.
_SECRET = re.compile(
    r"(?:TOKEN|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY|ACCESSKEY|PRIVATEKEY)(?!_?SHA256)(?![A-Z])"
    r"|(?<![A-Z])(?:KEY|KEYS|PASS|PWD|AUTH|BEARER|COOKIE)(?!_?SHA256)(?![A-Z])",
    re.IGNORECASE,
)
# What a value is given to on a command line: `a.b=`, a key in a flow mapping, an option.
_GIVEN = re.compile(r"^--?([\w-]+)|([\w.-]+)[\"']?\s*[=:]")


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
            _refuse_secret("env", name)
        for argument in self.arguments:
            for given in _GIVEN.finditer(argument):
                _refuse_secret("arguments", given[1] or given[2])


def _refuse_secret(field: str, name: str) -> None:
    if _SECRET.search(name):
        raise ConfigError(
            f"{field}: {name} looks like a secret; set it on the nodes and list it in `secrets`"
        )
