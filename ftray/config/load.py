"""YAML files to specs: `${VAR}` and `~` expanded, `a.b=c` overrides applied, the resolved tree written back."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ftray.core.errors import ConfigError
from ftray.core.fs import write_bytes
from ftray.core.paths import set_path
from ftray.core.spec import dump, parse

T = TypeVar("T")

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `4e-3` as a string; JSON, YAML 1.2 and every reader of recipes take it for a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.MarkedYAMLError(problem=f"`{key}` stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )


def read_yaml(path: str | Path) -> Any:
    """Plain data of a YAML file, expanded. Raises `ConfigError` (one line) if it is missing or not YAML."""
    return _expand(_read(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Plain data of a YAML text. Raises `ConfigError` (one line) that begins with `where`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}:{line} is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not YAML: {' '.join(str(error).split())}") from None


def _read(path: str | Path) -> Any:
    try:
        text = Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    return parse_yaml(text, str(path))


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file as a spec.

    Args:
        cls: the spec class, for example `Recipe`.
        path: the YAML file.
        overrides: `a.b=value` strings, the value in YAML; they win over the file.

    Raises:
        ConfigError: one line naming the file, the field, the value and the remedy.
    """
    data = _read(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no settings; write a mapping of fields")
    for override in overrides:
        apply_override(data, override)
    # Expanded last: a variable that an override has replaced need not be set.
    return parse(cls, _expand(data, str(path)), where=str(path))


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` to plain data."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: not an override; write it as `section.field=value`")
    try:
        value = _expand(yaml.load(text, _Loader), override)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not YAML; quote it") from None
    set_path(data, key, value)


def to_yaml(spec: Any) -> str:
    """The resolved tree as YAML, every default written out."""
    return text_of(dump(spec), sort_keys=False, allow_unicode=True)


def text_of(value: Any, **style: Any) -> str:
    """Plain data as YAML that this module reads back as it was; `style` as of `yaml.dump`."""
    return str(yaml.dump(value, Dumper=_Dumper, **style))


def write_resolved(spec: Any, path: Path) -> None:
    """Write the resolved tree next to what was made with it."""
    write_bytes(path, to_yaml(spec).encode())


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ConfigError(
                f"{where}: ${{{match[1]}}} is not set; export it or write ${{{match[1]}:-default}}"
            )
        return found

    text = _VARIABLE.sub(variable, value)
    return os.path.expanduser(text) if text.startswith("~") else text  # noqa: PTH111 (a glob may follow)
