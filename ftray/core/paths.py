"""Dotted paths into nested plain data: `optim.learning_rate`, `data.transforms.length.max_chars`, `data.train.0`.

An element of a list is called by what it says it is, its `type` or `source`, if no other one says the same, else by
its number. A key may have dots of its own (`data.mixture.a.jsonl.weight`).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ftray.core.errors import ConfigError

Keys = list[str | int]
"""Keys of mappings and numbers of elements of lists, outermost first."""

_CALLED_BY = ("type", "source")


def paths(data: Any, prefix: str = "") -> list[str]:
    """Every path into nested data, those of mappings and lists themselves included."""
    found = []
    for name, (_, child) in _children(data).items():
        found += [prefix + name, *paths(child, f"{prefix}{name}.")]
    return found


def value_at(data: Any, path: str) -> Any:
    """The value at a path; None where there is none."""
    for name, (_, child) in _children(data).items():
        if path == name:
            return child
        if path.startswith(f"{name}."):
            return value_at(child, path.removeprefix(f"{name}."))
    return None


def set_path(data: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a path, making mappings that are missing; containers on the way are replaced by copies.

    A name standing for a piece (`adapt: lora`) becomes a mapping.

    Raises:
        ConfigError: if something on the way has no such element, or no fields at all.
    """
    *parents, leaf = _keys(data, path, path)
    node: Any = data
    for key in parents:
        child = node.get(key) if isinstance(node, Mapping) else node[key]
        if isinstance(child, str):
            child = {"type": child}
        elif child is not None and not isinstance(child, Mapping | list):
            raise ConfigError(f"{path}: `{key}` is {child!r}, which has no fields")
        node[key] = list(child) if isinstance(child, list) else dict(child or {})
        node = node[key]
    node[leaf] = value


def _keys(data: Any, path: str, whole: str) -> Keys:
    """The keys of a path, as far as they are there; the rest is divided at its dots."""
    children = _children(data)
    for name, (key, child) in children.items():
        if path == name:
            return [key]
        if path.startswith(f"{name}."):
            return [key, *_keys(child, path.removeprefix(f"{name}."), whole)]
    if isinstance(data, list):
        known = ", ".join(children) or "it is empty"
        raise ConfigError(f"{whole}: the list has no element `{path}`; its elements are: {known}")
    return list(path.split("."))


def _children(data: Any) -> dict[str, tuple[str | int, Any]]:
    """What the parts of a mapping or list are called, with their keys; the longest names first."""
    found: dict[str, tuple[str | int, Any]] = {}
    if isinstance(data, Mapping):
        found = {str(key): (key, value) for key, value in data.items()}
    elif isinstance(data, list):
        names = [_name(element) for element in data]
        times = Counter(names)
        found = {
            name if name and times[name] == 1 else str(number): (number, element)
            for number, (name, element) in enumerate(zip(names, data, strict=True))
        }
    # A name that another one begins with (`a` and `a.b`) must not be taken for it.
    return dict(sorted(found.items(), key=lambda item: -item[0].count(".")))


def _name(element: Any) -> str:
    """What an element of a list says it is; empty: nothing."""
    if not isinstance(element, Mapping):
        return ""
    return next((str(element[field]) for field in _CALLED_BY if element.get(field)), "")
