"""`@spec`: a class that is its own configuration.

A piece of ftray (an adapter method, an objective, a strategy, a recipe) is a frozen dataclass whose fields
are its settings; pydantic checks them, unknown keys are refused with the nearest known one, and the docstring
under a field is its help text. `parse` builds one from plain data, `dump` turns one back into plain data.
A field where people may paste a secret is declared with `Field(repr=False)`: no message shows its value.
"""

import dataclasses
import difflib
import functools
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, cast, dataclass_transform, get_args, get_origin, get_type_hints

import pydantic
from pydantic import BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from ftray import catalog
from ftray.core.errors import ConfigError, FtrayError
from ftray.core.paths import set_path

T = TypeVar("T")

_CONFIG = ConfigDict(
    extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True, ser_json_inf_nan="constants"
)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only, strictly checked dataclass."""
    return cast(type[T], pydantic_dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls))


def Piece(kind: str, *, optional: bool = False) -> BeforeValidator:
    """Annotation of a field that holds a method from the catalog.

    The value is a name (`lora`), a mapping with its settings (`{type: lora, r: 8}`) or a ready object;
    `package.module:attr` stands for the user's own class. An `optional` one may be null.
    """
    return BeforeValidator(functools.partial(build_piece, kind, optional=optional))


def build_piece(kind: str, value: Any, *, optional: bool = False) -> Any:
    """Build a catalog piece from a name, a mapping or an object that is one already."""
    if value is None and optional:
        return None
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return value
        raise ConfigError(f"{value!r} is not a {kind}; write its name, or `type:` and its settings")
    settings = dict(value)
    if "type" not in settings:
        raise ConfigError(f"`type` is missing; say which {kind}, one of: {', '.join(catalog.names(kind))}")
    cls = catalog.resolve(kind, str(settings.pop("type")))
    return parse(cls, settings, where="")


def parse(cls: type[T], data: Any, where: str = "") -> T:
    """Build a `@spec` class from plain data.

    Args:
        cls: the class.
        data: a mapping of its fields.
        where: the file the data came from, for the message.

    Raises:
        ConfigError: one line naming the field, the value and the remedy.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(data, Mapping):
        shown = "this" if _may_be_secret(cls) else _shown(data)
        raise ConfigError(f"{prefix}{shown} is not a mapping of settings")
    try:
        return cls(**{str(key): value for key, value in data.items()})
    except pydantic.ValidationError as error:
        raise ConfigError(prefix + _one_line(cls, error)) from None
    except FtrayError as error:
        raise ConfigError(prefix + str(error)) from None


def dump(obj: Any) -> Any:
    """Plain data (JSON and YAML can hold it) from which `parse` builds an equal object."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        pieces = _piece_fields(type(obj))
        plain = {
            field.name: _dump_piece(value) if field.name in pieces else dump(value)
            for field in dataclasses.fields(obj)
            for value in [getattr(obj, field.name)]
        }
        name = catalog.name_of(type(obj))
        return {"type": name, **plain} if name else plain
    if isinstance(obj, Mapping):
        return {str(key): dump(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [dump(value) for value in obj]
    return str(obj) if isinstance(obj, Path) else obj


def _dump_piece(value: Any) -> Any:
    """As `dump`, with `type` also for the user's own class, as the path it is imported by."""
    if isinstance(value, list | tuple):
        return [_dump_piece(item) for item in value]
    plain = dump(value)
    if dataclasses.is_dataclass(value) and "type" not in plain:
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}", **plain}
    return plain


@functools.cache
def _piece_fields(cls: Any) -> frozenset[str]:
    """Names of the fields annotated with `Piece`, alone or in a list."""
    hints = get_type_hints(cls, include_extras=True)
    return frozenset(name for name, hint in hints.items() if _is_piece(hint))


def _is_piece(hint: Any) -> bool:
    marks = [getattr(mark, "func", None) for mark in getattr(hint, "__metadata__", ())]
    return any(getattr(mark, "func", None) is build_piece for mark in marks) or any(
        _is_piece(inner) for inner in get_args(hint)
    )


def replace(obj: T, path: str, value: Any) -> T:
    """A copy of a spec with the field at a dotted path (`optim.learning_rate`) set, checked again."""
    data = dump(obj)
    set_path(data, path, value)
    cls: Any = type(obj)
    if name := catalog.name_of(cls):
        assert data.pop("type") == name
    return cast(T, parse(cls, data, where=path))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(cls: type, error: pydantic.ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    field = ".".join(location) or cls.__name__
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(cls, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known) or 'none'}"
        return f"{field}: unknown key; {hint}{more}"
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{field}: missing; give it a value{more}"
    message = first["msg"].removeprefix("Value error, ")
    message = (
        message[0].lower() + message[1:] if message[:1].isupper() and not message[1:2].isupper() else message
    )
    if isinstance(first.get("ctx", {}).get("error"), FtrayError):
        joiner = "." if message.split(":")[0].replace("_", "").replace(".", "").isalnum() else ": "
        return f"{field}{joiner}{message}{more}" if ":" in message else f"{field}: {message}{more}"
    shown = "this value" if _may_be_secret(cls, location) else _shown(first["input"])
    return f"{field}: {shown} is refused; {message}{more}"


def _may_be_secret(annotation: Any, location: Sequence[str] = ()) -> bool:
    """True if the value at a location is, or holds, that of a field declared with `repr=False`."""
    for position, part in enumerate(location):
        field = _spec_fields(annotation).get(part)
        if field is not None:
            return not field.repr or _may_be_secret(field.annotation, location[position + 1 :])
    return any(
        not field.repr or _may_be_secret(field.annotation) for field in _spec_fields(annotation).values()
    )


def _spec_fields(annotation: Any) -> dict[str, FieldInfo]:
    return getattr(_dataclass_in(annotation), "__pydantic_fields__", {})


def _fields_at(cls: Any, location: list[str]) -> list[str]:
    """Field names of the dataclass reached by a location inside `cls`."""
    for part in location:
        if part.isdigit():
            continue
        hints = {field.name: field.type for field in dataclasses.fields(cls)}
        if part in hints:
            cls = _dataclass_in(hints[part]) or cls
    return [field.name for field in dataclasses.fields(cls)]


def _dataclass_in(annotation: Any) -> Any:
    if dataclasses.is_dataclass(annotation):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list, tuple):
        for inner in get_args(annotation):
            if found := _dataclass_in(inner):
                return found
    return None
