"""What a submitted job takes along: its configuration, the local files that names, and nothing else."""

import contextlib
import fnmatch
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftray import catalog
from ftray.config.job import JobConfig
from ftray.config.load import apply_override, read_yaml
from ftray.core.errors import ClusterError, ConfigError

_OUTPUT_KEYS = {"output_dir", "output", "cache_dir", "name"}
_DATA_SUFFIXES = {
    ".jsonl",
    ".json",
    ".yaml",
    ".yml",
    ".txt",
    ".csv",
    ".parquet",
    ".gz",
    ".zst",
    ".safetensors",
}
_SECRET_NAMES = (
    *(
        ".env*",
        ".git",
        ".ssh",
        ".aws",
        ".azure",
        ".gnupg",
        ".kube",
        ".docker",
        ".netrc",
        ".pgpass",
        ".pypirc",
    ),
    *(".npmrc", ".git-credentials", "*.pem", "*.key", "*.p12", "*.pfx", "*.keytab", "id_rsa*", "id_ed25519*"),
)
_NOT_NEEDED = ("venv", "__pycache__")


@dataclass(frozen=True)
class Bundle:
    """Files of a job."""

    files: dict[str, Path] = field(default_factory=dict)
    """Place in the job's folder -> local file."""
    expected: list[str] = field(default_factory=list)
    """Paths the cluster must have itself."""
    withheld: list[str] = field(default_factory=list)
    """Places that are not sent because they are hidden or a secret by their name."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(path.stat().st_size for path in self.files.values())

    def copy_to(self, folder: Path) -> None:
        """Lay the files out in a folder."""
        for place, path in self.files.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def collect(job: JobConfig) -> Bundle:
    """The files a job needs, found from where the user stands.

    Relative paths stay as they are written, so they mean the same on the cluster. An absolute path is not
    sent: it is expected on the cluster (`Bundle.expected`). Hidden files, and secrets by their name, of a folder
    stay here (`Bundle.withheld`).

    Raises:
        ConfigError: for a file that is named but not there, is a secret by its name, or lies (or links) outside
            the current folder.
        ClusterError: if there is more to send than `max_upload_mb`.
    """
    bundle = Bundle()
    if job.working_dir:
        root = Path(job.working_dir)
        if not root.is_dir():
            raise ConfigError(f"working_dir: {job.working_dir!r} is not a folder; check the path")
        _add(bundle, root, root)
        if Path(job.config).is_file():
            _add(bundle, Path(job.config), root)  # it was named, so it may be hidden
    elif job.config:
        _add(bundle, Path(job.config), Path())
        overrides = [
            argument for argument in job.arguments if "=" in argument and not argument.startswith("-")
        ]
        with _stand_ins(job.secrets):
            _follow(bundle, job.config, overrides)
    for name in job.files:
        if not _take(bundle, name, "files"):
            raise ConfigError(f"files: {name!r} does not exist; check the path")
    if job.config and _place(job) not in bundle.files:
        raise ConfigError(f"config: {job.config!r} is not a file inside {job.working_dir or 'this folder'}")
    _check_size(bundle, job.max_upload_mb)
    return bundle


def command_line(job: JobConfig) -> str:
    """The job's shell command. Every value is quoted: Ray hands the line to a shell."""
    words = ["ftray", job.verb, *([_place(job)] if job.config else []), *job.arguments]
    # `${X:?}` ends the shell when X is unset or empty; the value itself never leaves the node.
    required = [f': "${{{name}:?is not set on this cluster, and the job needs it}}"' for name in job.secrets]
    return " && ".join([*required, shlex.join(words)])


@contextlib.contextmanager
def _stand_ins(names: Sequence[str]) -> Iterator[None]:
    """Let a file refer to variables that are set on the cluster only."""
    missing = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, ""))
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _place(job: JobConfig) -> str:
    """Where the configuration lies in the job's folder."""
    return os.path.relpath(job.config, job.working_dir) if job.working_dir else os.path.normpath(job.config)


def _follow(bundle: Bundle, config: str, overrides: Sequence[str] = ()) -> None:
    """Add the files a YAML names, and those that these name."""
    data = read_yaml(config)
    if not isinstance(data, dict):
        return
    for override in overrides:
        apply_override(data, override)
    for text in _strings(data):
        new = _take(bundle, text, config)
        for path in new or []:
            if path.suffix in (".yaml", ".yml"):
                _follow(bundle, str(path))


def _strings(value: Any) -> Iterator[str]:
    """Every string in plain data that may be a path to read."""
    if isinstance(value, str):
        if value not in ("", ".", "..") and "\0" not in value and len(value) < 1024:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _OUTPUT_KEYS:
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _take(bundle: Bundle, text: str, where: str) -> list[Path] | None:
    """Add what a string names; the files that are new, or None if it names nothing here."""
    if any(text in table for table in catalog.METHODS.values()):
        return None
    if text.startswith("/"):
        if text not in bundle.expected:
            bundle.expected.append(text)
        return []
    if ":" in text and "/" not in text:  # the user's own `package.module:attr`
        text = text.partition(":")[0].partition(".")[0]
        text = text if Path(text).is_dir() else f"{text}.py"
    found = [Path(text)] if os.path.lexists(text) else sorted(Path().glob(text)) if "*" in text else []
    is_data = Path(text).suffix in _DATA_SUFFIXES and not any(map(str.isspace, text))
    if not found and (is_data or "*" in text):
        raise ConfigError(
            f"{where}: {text!r} is not here; check it, or give its absolute path on the cluster"
        )
    return [path for item in found for path in _add(bundle, item, Path())] if found else None


def _add(bundle: Bundle, path: Path, root: Path) -> list[Path]:
    """Add a file, or all files of a folder; returns the new ones."""
    named = _inside(path, root)
    if not path.exists():
        raise ConfigError(f"{path}: no such file; check the path")
    if any(map(_is_secret, (*named.parts, *Path(os.path.relpath(path, root)).parts))):
        raise ConfigError(f"{path}: a secret by its name, which is not sent; put it on the cluster's nodes")
    members = [path] if path.is_file() else [item for item in sorted(path.rglob("*")) if item.is_file()]
    new = []
    for member in members:
        inner = member.relative_to(path)
        # A link is judged by its own name and by what it leads to.
        kept = next((part for part in inner.parts if _stays_here(part)), None)
        if kept is None and any(map(_is_secret, _inside(member, root).parts)):
            kept = inner.parts[-1]
        place = os.path.relpath(member, root)
        if kept is not None:
            _withhold(bundle, place, kept)
        elif place not in bundle.files:
            bundle.files[place] = member
            new.append(member)
    return new


def _inside(path: Path, root: Path) -> Path:
    """Where a path leads, links followed, relative to the folder it must not leave (`ConfigError`)."""
    real, real_root = path.resolve(), root.resolve()
    if not real.is_relative_to(real_root):
        remedy = "copy the file there" if path.is_symlink() else "submit from a folder above it"
        raise ConfigError(f"{path} lies outside {real_root}; {remedy}")
    return real.relative_to(real_root)


def _is_secret(name: str) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _SECRET_NAMES)


def _stays_here(name: str) -> bool:
    return name.startswith(".") or name in _NOT_NEEDED or _is_secret(name)


def _withhold(bundle: Bundle, place: str, part: str) -> None:
    """Note what stays here: a whole folder once; nothing for what no job needs."""
    parts = Path(place).parts
    top = str(Path(*parts[: parts.index(part) + 1]))
    if part not in _NOT_NEEDED and top not in bundle.withheld:
        bundle.withheld.append(top)


def _check_size(bundle: Bundle, max_mb: int) -> None:
    if bundle.size_bytes > max_mb * 1_000_000:
        largest = max(bundle.files.values(), key=lambda path: path.stat().st_size)
        size_mb = round(bundle.size_bytes / 1_000_000)
        raise ClusterError(
            f"{size_mb} MB to send, more than max_upload_mb={max_mb}; the largest is {largest}: "
            "put it on storage the cluster reads and name that, or raise the limit"
        )
